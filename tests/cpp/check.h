#pragma once
#include <cstdio>
#include <cstdlib>
#include <random>

// CHECK stops at the first false condition and prints what the caller adds, printf-like.
#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, " " __VA_ARGS__);                               \
      std::fprintf(stderr, "\n");                                          \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

namespace mmfast::testing {

inline std::mt19937_64& random() {
  static std::mt19937_64 engine(20240607);
  return engine;
}
inline long integer(long low, long high) {
  return std::uniform_int_distribution<long>(low, high)(random());
}
inline double normal() { return std::normal_distribution<double>()(random()); }

}  // namespace mmfast::testing

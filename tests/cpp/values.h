#pragma once
#include <cmath>
#include <cstring>
#include <vector>

#include "../../csrc/view.h"
#include "check.h"

// Inputs of any element type with the numbers they hold, for tests that compare with plain loops.
namespace mmfast::testing {

inline int size_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

// Values that every type holds exactly, so one double matrix describes all of them.
inline double exact(Type type, double x) {
  if (type == Type::f64) return x;
  if (type == Type::f32) return float(x);
  return std::ldexp(std::nearbyint(std::ldexp(x, 5)), -5);
}

inline void put(Type type, void* at, double x) {
  if (type == Type::f64) std::memcpy(at, &x, 8);
  const float narrow = float(x);
  if (type == Type::f32) std::memcpy(at, &narrow, 4);
  uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  uint16_t half = uint16_t(bits >> 16);
  if (type == Type::f16 && x != 0) {
    const int exponent = int((bits >> 23) & 255) - 112;
    half = uint16_t((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 1023));
  }
  if (size_of(type) == 2) std::memcpy(at, &half, 2);
}

inline double get(Type type, const char* at) {
  double wide;
  float narrow;
  uint16_t half;
  if (type == Type::f64) return std::memcpy(&wide, at, 8), wide;
  if (type == Type::f32) return std::memcpy(&narrow, at, 4), narrow;
  std::memcpy(&half, at, 2);
  if (type == Type::bf16) {
    const uint32_t bits = uint32_t{half} << 16;
    return std::memcpy(&narrow, &bits, 4), narrow;
  }
  const int exponent = (half >> 10) & 31;
  const double magnitude =
      exponent ? std::ldexp(1024 + (half & 1023), exponent - 25) : std::ldexp(half & 1023, -24);
  return half & 0x8000 ? -magnitude : magnitude;
}

// A matrix with its bytes; rows may be further apart than they are long.
struct Input {
  std::vector<double> values;
  std::vector<char> bytes;
  View view;
  Input(Type type, long rows, long cols) : values(rows * cols) {
    const long stride = cols + (integer(0, 1) ? integer(1, 9) : 0);
    bytes.resize(((rows - 1) * stride + cols) * size_of(type));
    view = {bytes.data(), rows, cols, stride, 1, type};
  }
  template <class Value>
  Input(Type type, long rows, long cols, Value value) : Input(type, rows, cols) {
    for (long i = 0; i < rows; ++i) {
      for (long d = 0; d < cols; ++d) {
        double& x = values[i * cols + d];
        x = exact(type, value(i, d));
        put(type, bytes.data() + (i * view.row_stride + d) * size_of(type), x);
      }
    }
  }
};

// A result of the op, exactly as large as needed, and what stands behind it.
struct Output {
  static constexpr long kGuard = 64;
  std::vector<char> bytes;
  View view;
  Output(Type type, long rows, long cols, bool asked = true)
      : bytes(rows * cols * size_of(type) + kGuard, 0x5a) {
    if (asked) view = {bytes.data(), rows, cols, cols, 1, type};
  }
  double at(long i) const { return get(view.type, bytes.data() + i * size_of(view.type)); }
  bool guarded() const {
    const long from = view ? long(bytes.size()) - kGuard : 0;
    for (long i = from; i < long(bytes.size()); ++i) {
      if (bytes[i] != 0x5a) return false;
    }
    return true;
  }
};

}  // namespace mmfast::testing

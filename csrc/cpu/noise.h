#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vmath.h"

// Random words that depend on a counter and a key alone, so that no order of work changes them, and
// the Gumbel noise they stand for.
namespace mmfast::MMFAST_LEVEL {

// 32 bits a lane, in its lower half; the upper one holds anything
using Words = typename Simd<double>::Bits;

inline Words lower_product(Words a, uint32_t b) {
#if defined(__AVX512F__)
  return (Words)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__x86_64__)
  return (Words)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffff) * uint64_t{b};
#endif
}

// A shuffle, where a shift would wait for the unit that multiplies.
inline Words upper_halves(Words a) {
  return (Words)shuffle<float>((Vec<float>)a, (Vec<float>)a, [](size_t l) { return l | 1; });
}

struct Quad {
  Words a, b, c, d;
};

// The words of each lane's counter by Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random
// numbers: as easy as 1, 2, 3, SC 2011).
[[gnu::always_inline]] inline Quad philox(Quad x, uint64_t key) {
  uint32_t low = uint32_t(key), high = uint32_t(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Words p = lower_product(x.a, 0xD2511F53);
    const Words q = lower_product(x.c, 0xCD9E8D57);
    x = {upper_halves(q) ^ x.b ^ uint64_t{low}, q, upper_halves(p) ^ x.d ^ uint64_t{high}, p};
    low += 0x9E3779B9, high += 0xBB67AE85;
  }
  return x;
}

// The four words of a counter side by side, those of the next behind them.
inline void store_across(const Quad& x, uint32_t* to) {
  const auto pair = [](Words low, Words high) {
    return (Vec<double>)((low & 0xffffffff) | high << 32);
  };
  constexpr size_t kLanes = kWidth<double>;
  const Vec<double> ab = pair(x.a, x.b), cd = pair(x.c, x.d);
  const auto near = shuffle<double>(ab, cd, [](size_t l) { return l / 2 + l % 2 * kLanes; });
  const auto far =
      shuffle<double>(ab, cd, [](size_t l) { return l / 2 + kLanes / 2 + l % 2 * kLanes; });
  std::memcpy(to, &near, kVectorBytes);
  std::memcpy(to + kWidth<float>, &far, kVectorBytes);
}

// The same words below one another in rows `stride` apart, those of the next counter beside them.
inline void store_down(const Quad& x, uint32_t* to, long stride) {
  typedef uint32_t Half __attribute__((vector_size(kVectorBytes / 2)));
  const Words words[] = {x.a, x.b, x.c, x.d};
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const Half row = __builtin_convertvector(words[r], Half);
    std::memcpy(to + r * stride, &row, sizeof(row));
  }
}

// With v the word as a number in (0, 1), -log(-log(1 - v)). The largest come of the smallest v:
// those 1 - v would lose, log1p loses none.
inline double gumbel(uint32_t word) { return -std::log(-std::log1p(-(word + 0.5) * 0x1p-32)); }

// No less than that, and little more where it is large: -log v, for the logarithm to base 2 what a
// float's bits say of it when read as an integer (at most 0.09 too little). One bit of the word is
// dropped, for a conversion that every processor has.
inline float gumbel_bound(uint32_t word) {
  constexpr float kLn2 = 0.69314718f, kExponents = 127 + 31;
  const int32_t bits = std::bit_cast<int32_t>(float(int32_t(word >> 1)));
  return kLn2 * kExponents - kLn2 * 0x1p-23f * float(bits);
}

}  // namespace mmfast::MMFAST_LEVEL

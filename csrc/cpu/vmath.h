#pragma once
#include <cmath>
#include <limits>
#include <utility>

#include "isa.h"

// Exponentials and reductions on vectors. NaN stays NaN, and stays in its lane.
namespace mmfast::MMFAST_LEVEL {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
template <class T>
constexpr T kInf = std::numeric_limits<T>::infinity();

// a > b ? a : b; where a is NaN, b
template <class T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_max_ps((__m512)a, (__m512)b);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_max_pd((__m512d)a, (__m512d)b);
#else
  return a > b ? a : b;
#endif
}

// a < b ? a : b; where a is NaN, b
template <class T>
inline Vec<T> smaller(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_min_ps((__m512)a, (__m512)b);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_min_pd((__m512d)a, (__m512d)b);
#else
  return a < b ? a : b;
#endif
}

template <class T>
inline Vec<T> select(Ints<T> where, Vec<T> a, Vec<T> b) {
  return where ? a : b;
}

// 1 / x for normal x; in float32 within 2 ulp
template <class T>
inline Vec<T> reciprocal(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    // 14 bits, and a step of Newton's: a division takes longer than the exponential before it
    const Vec<T> y = (Vec<T>)_mm512_rcp14_ps((__m512)x);
    return y + y * (1 - x * y);
  }
#endif
  return 1 / x;
}

// c[0] + c[1] x + c[2] x^2 + ...
template <class T, int kCount>
inline Vec<T> polynomial(const double (&c)[kCount], Vec<T> x) {
  Vec<T> sum = broadcast<T>(c[kCount - 1]);
#pragma GCC unroll 12
  for (int i = kCount - 2; i >= 0; --i) sum = sum * x + broadcast<T>(c[i]);
  return sum;
}

// 2^f on [-1/2, 1/2], least relative error (Remez): 7e-5, 3e-6, 9e-8, and 3e-18 for degree 11.
// Where sums are merged over and over, 2^0 must be 1, or they drift; degree 3 makes gradients only.
template <int kDegree>
struct Exp2Poly;
template <>
struct Exp2Poly<3> {
  static constexpr double c[] = {0.9999280735, 0.6932609855, 0.2426111222, 0.05517166909};
};
template <>
struct Exp2Poly<4> {
  static constexpr double c[] = {1.0, 0.693124193368, 0.240240986113, 0.0559064250367,
                                 0.00958285316894};
};
template <>
struct Exp2Poly<5> {
  static constexpr double c[] = {
      1.0, 0.693146977599, 0.240222420846, 0.0555073374357, 0.00967151268818, 0.00132647272471};
};
template <>
struct Exp2Poly<11> {
  static constexpr double c[] = {1.0,
                                 0.69314718055994533046,
                                 0.24022650695910156205,
                                 0.055504108664819921483,
                                 0.0096181291075883350833,
                                 0.0013333558146789950323,
                                 0.00015403530462514613026,
                                 0.0000152527334899608046,
                                 1.3215433089594629037e-6,
                                 1.0178198033328527665e-7,
                                 7.074105626245659364e-9,
                                 4.4352809446103356854e-10};
};

// 2^x: 0 below the smallest normal number (roughly: within a factor of 2), so also for -inf; no
// less than the largest number, or NaN, from 2^128 on (f64: 2^1024). f64 takes degree 11 always.
template <int kDegree, class T>
inline Vec<T> exp2(Vec<T> x) {
  using Poly = Exp2Poly<sizeof(T) == 8 ? 11 : kDegree>;
  constexpr T kLowest = sizeof(T) == 8 ? -1022 : -126;
  // clamped on both sides of the polynomial: -inf - -inf would be NaN
  Vec<T> bounded = larger<T>(broadcast<T>(kLowest - 64), x);
#if defined(__AVX512F__)
  Vec<T> n;
  if constexpr (sizeof(T) == 4) n = (Vec<T>)_mm512_roundscale_ps((__m512)bounded, 0);
  if constexpr (sizeof(T) == 8) n = (Vec<T>)_mm512_roundscale_pd((__m512d)bounded, 0);
#else
  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
  constexpr T kMagic = sizeof(T) == 8 ? 6755399441055744.0 : 12582912.0;
  // an exponent too large would wrap in the sum of bits below
  constexpr T kHighest = 2 - kLowest;
  bounded = select<T>(bounded < kHighest, bounded, broadcast(kHighest));
  const Vec<T> shifted = bounded + kMagic;
  const Vec<T> n = shifted - kMagic;
#endif
  const Vec<T> f = bounded - n;
  const Vec<T> p = polynomial<T>(Poly::c, f);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_scalef_ps((__m512)p, (__m512)n);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_scalef_pd((__m512d)p, (__m512d)n);
#else
  constexpr int kMantissa = sizeof(T) == 8 ? 52 : 23;
  using Bits = typename Simd<T>::Bits;
  const Vec<T> y = (Vec<T>)((Bits)p + ((Bits)shifted << kMantissa));
  return select<T>(x >= kLowest, y, select<T>(x < kLowest, Vec<T>{}, x));
#endif
}

// log2(1 + x) / x on [0, 1], least relative error (Remez): 3e-8 and 9e-18.
template <class T>
struct Log2Poly;
template <>
struct Log2Poly<float> {
  static constexpr double c[] = {1.442694997456,   -0.7213402089835,  0.480692954539,
                                 -0.3584083678718, 0.2756408086289,   -0.1971173970761,
                                 0.1128540840101,  -0.04256564511657, 0.007548804519646};
};
template <>
struct Log2Poly<double> {
  static constexpr double c[] = {
      1.4426950408889633943,    -0.72134752044446993755,    0.48089834696122703164,
      -0.36067376011726750507,  0.28853900485241277728,     -0.2404491087371699301,
      0.20609844614283456559,   -0.18032903780204150246,    0.16024564184459625264,
      -0.1439882816355040245,   0.13000926315911852627,     -0.11653067056112528479,
      0.10139272219008298755,   -0.082794271024331690652,   0.060834273423102431366,
      -0.038409993287076176012, 0.019846604025345257246,    -0.0079381662711185873765,
      0.0022820162804999589792, -0.00041667922983678873651, 0.000036129341758253509126};
};

// log2(1 + x) for 0 <= x < 2^64, relatively exact also where x is tiny.
template <class T>
inline Vec<T> log2_1p(Vec<T> x) {
  using Bits = typename Simd<T>::Bits;
  constexpr int kMantissa = sizeof(T) == 8 ? 52 : 23, kBias = sizeof(T) == 8 ? 1023 : 127;
  const Vec<T> one = broadcast<T>(1), y = 1 + x;
  const Bits exponent = (Bits)y >> kMantissa;
  const Vec<T> power = __builtin_convertvector((Ints<T>)exponent - kBias, Vec<T>);
  const Vec<T> mantissa = (Vec<T>)(((Bits)y ^ exponent << kMantissa) | (Bits)one);
  const Vec<T> f = select<T>(y < 2, x, mantissa - 1);
  return power + f * polynomial<T>(Log2Poly<T>::c, f);
}

// A sum of softplus in units of log 2, log2(1 + 2^x), as it grows: the parts max(0, x), and with
// e = 2^-|x| the product (1 + e_1) (1 + e_2) ... less 1, of which one logarithm is taken at the
// end. No 1 is added to an e, so that tiny ones count. For at most 60 terms.
template <class T>
struct Softplus2 {
  Vec<T> whole = {}, product = {};

  // Adds the term of x: nothing at -inf. Returns its slope 2^x / (1 + 2^x).
  Vec<T> add(Vec<T> x) {
    const Vec<T> minus_size = (Vec<T>)((Ints<T>)x | (Ints<T>)broadcast<T>(-0.0));
    const Vec<T> e = exp2<5, T>(minus_size), one = broadcast<T>(1);
    whole += larger<T>(Vec<T>{}, x);
    product += product * e + e;
    return select<T>(x > 0, one, e) * reciprocal<T>(one + e);
  }
  void add(const Softplus2& other) {
    whole += other.whole;
    product += product * other.product + other.product;
  }
  Vec<T> value() const { return whole + log2_1p<T>(product); }
};

// Lanes of a and b, as if one vector of twice the width, by the index of each lane of the result.
template <class T, class Index, size_t... I>
inline Vec<T> shuffle(Vec<T> a, Vec<T> b, Index index, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index(I)...);
#else
  return __builtin_shuffle(a, b, Ints<T>{typename Simd<T>::Int(index(I))...});
#endif
}
template <class T, class Index>
inline Vec<T> shuffle(Vec<T> a, Vec<T> b, Index index) {
  return shuffle<T>(a, b, index, std::make_index_sequence<kWidth<T>>{});
}

// Lane i of the result is the sum of rows[i]; the rows are overwritten.
template <class T>
inline Vec<T> sums_of(Vec<T>* rows) {
#pragma GCC unroll 4
  for (int n = kWidth<T> / 2; n >= 1; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      rows[i] = shuffle<T>(rows[2 * i], rows[2 * i + 1], [](size_t l) { return 2 * l; }) +
                shuffle<T>(rows[2 * i], rows[2 * i + 1], [](size_t l) { return 2 * l + 1; });
    }
  }
  return rows[0];
}

// Rows become columns. Dealing the two halves into each other turns the bits of an element's place
// by one; after as many rounds as a lane has bits, row and lane have changed places.
template <class T>
inline void transpose(Vec<T>* rows) {
  constexpr size_t kHalf = kWidth<T> / 2;
#pragma GCC unroll 4
  for (size_t round = 1; round <= kHalf; round *= 2) {
    Vec<T> dealt[kWidth<T>];
#pragma GCC unroll 8
    for (size_t i = 0; i < kHalf; ++i) {
      dealt[2 * i] =
          shuffle<T>(rows[i], rows[i + kHalf], [](size_t l) { return l / 2 + l % 2 * kWidth<T>; });
      dealt[2 * i + 1] = shuffle<T>(rows[i], rows[i + kHalf],
                                    [](size_t l) { return l / 2 + kHalf + l % 2 * kWidth<T>; });
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth<T>; ++i) rows[i] = dealt[i];
  }
}

template <class T>
inline T largest_lane(Vec<T> v) {
  T best = v[0];
  for (int i = 1; i < kWidth<T>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

template <class T>
inline double sum_of_lanes(Vec<T> v) {
  double sum = 0;
  for (int i = 0; i < kWidth<T>; ++i) sum += v[i];
  return sum;
}

// A bit for every lane of a comparison.
template <class T>
inline unsigned bits_of(Ints<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_movepi32_mask((__m512i)v);
  if constexpr (sizeof(T) == 8) return _mm512_movepi64_mask((__m512i)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_movemask_ps((__m256)v);
  if constexpr (sizeof(T) == 8) return _mm256_movemask_pd((__m256d)v);
#else
  unsigned bits = 0;
  for (int i = 0; i < kWidth<T>; ++i) bits |= unsigned(v[i] & 1) << i;
  return bits;
#endif
}
template <class T>
inline bool all(Ints<T> v) {
  return bits_of<T>(v) == (1u << kWidth<T>)-1;
}
template <class T>
inline bool any(Ints<T> v) {
  return bits_of<T>(v) != 0;
}
template <class T>
inline int count_of(Ints<T> v) {
  return __builtin_popcount(bits_of<T>(v));
}

}  // namespace mmfast::MMFAST_LEVEL

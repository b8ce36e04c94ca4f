#pragma once
#include <cmath>

#include "vmath.h"

// The functions of angles on vectors, within two units in the last place (three for sines of large
// angles). NaN stays NaN, and what a lane holds changes no other lane's bits.
namespace mmfast::MMFAST_LEVEL {

// Polynomials of least relative error (Remez), after the terms that are exact:
//   sin x = x + x^3 sine(x^2)           on [-pi/4, pi/4]: 4e-9, f64 4e-18
//   cos x = 1 - x^2 / 2 + x^4 cosine(x^2)     there, too: 1e-10, f64 6e-20
//   arcsin x = x + x^3 arcsine(x^2)     on [-1/2, 1/2]:   5e-9, f64 1.5e-17
// pi/2 = high + middle + low, the first two with so few bits that n times each is exact for
// |n| < 2^15.
template <class T>
struct Trig;
template <>
struct Trig<float> {
  static constexpr double sine[] = {-0.16666654606695982991, 0.0083321605521135115554,
                                    -0.00019515252283591409518};
  static constexpr double cosine[] = {0.041666645676748820039, -0.0013887315952230693983,
                                      0.00002443312196615919967};
  static constexpr double arcsine[] = {0.16666752479889059916, 0.074952976540618264718,
                                       0.045470377365142412017, 0.024179501271518767268,
                                       0.042166338921649361069};
  static constexpr float high = 0x1.92p+0f, middle = 0x1.fbp-12f, low = 0x1.5110b4611a626p-22f;
  static constexpr float round = 0x1.8p+23f;
};
template <>
struct Trig<double> {
  static constexpr double sine[] = {-0.16666666666666630709,    0.0083333333333221131662,
                                    -0.00019841269829584947989, 2.7557313619716436659e-6,
                                    -2.5050747490767280537e-8,  1.5896213822817879554e-10};
  static constexpr double cosine[] = {0.041666666666666592884,    -0.001388888888887304954,
                                      0.000024801587288847200116, -2.7557314177934323207e-7,
                                      2.0875700648719167816e-9,   -1.1358526116378194184e-11};
  static constexpr double arcsine[] = {
      0.16666666666665409145,  0.075000000003369650723, 0.044642856828365555204,
      0.030381959135545102532, 0.022371758082349945953, 0.017359704307933002052,
      0.013885239768346603647, 0.012169184378425727392, 0.0065280897403865525698,
      0.019527959960141346447, -0.01622378494352212816, 0.031911956038269442051};
  static constexpr double high = 0x1.921fb544p+0, middle = 0x1.0b4611a6p-34,
                          low = 0x1.3198a2e037073p-69;
  static constexpr double round = 0x1.8p+52;
};

template <class T>
inline Vec<T> sqrt(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_sqrt_ps((__m512)x);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_sqrt_ps((__m256)x);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_sqrt_pd((__m256d)x);
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm_sqrt_ps((__m128)x);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm_sqrt_pd((__m128d)x);
#else
  for (int i = 0; i < kWidth<T>; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// arccos x, for |x| <= 1; NaN beyond.
template <class T>
inline Vec<T> acos(Vec<T> x) {
  const Vec<T> size = x < 0 ? -x : x;
  const auto outer = size > T(0.5);
  // arccos x = pi/2 - arcsin x, and 2 arcsin sqrt((1 - x) / 2) towards 1, where the first cancels
  const Vec<T> square = outer ? (1 - size) * T(0.5) : x * x;
  const Vec<T> from = outer ? sqrt<T>(square) : x;
  Vec<T> angle = from + from * square * polynomial<T>(Trig<T>::arcsine, square);
  angle = outer ? (x < 0 ? 2 * angle : -2 * angle) : angle;
  const Vec<T> quarters = outer ? (x < 0 ? broadcast<T>(2) : Vec<T>{}) : broadcast<T>(1);
  constexpr T kHalfPi = T(1.57079632679489661923);
  constexpr T kRest = sizeof(T) == 8 ? T(6.123233995736766036e-17) : T(-4.371139000186241e-8);
  return quarters * kHalfPi - (angle - quarters * kRest);
}

// sin(x + quarters pi/2)
template <int kQuarters, class T>
inline Vec<T> wave(Vec<T> x) {
  using Part = Trig<T>;
  using Bits = typename Simd<T>::Bits;
  // the sum rounds to an integer and leaves it in the low bits
  const Vec<T> shifted = x * T(0.63661977236758134308) + Part::round;
  const Vec<T> n = shifted - Part::round;
  const Vec<T> rest = x - n * Part::high - n * Part::middle - n * Part::low;
  const Vec<T> z = rest * rest;
  const Vec<T> sine = rest + rest * z * polynomial<T>(Part::sine, z);
  const Vec<T> cosine = 1 - z * T(0.5) + z * z * polynomial<T>(Part::cosine, z);
  const Bits turn = (Bits)shifted + kQuarters;
  Vec<T> y = (turn & 1) != 0 ? cosine : sine;
  y = (turn & 2) != 0 ? -y : y;
  // beyond, n times the parts of pi/2 would be rounded, and infinities have no n
  const Ints<T> far = (x < 0 ? -x : x) > T(1 << 14);
  if (__builtin_expect(any<T>(far), false)) {
    for (int i = 0; i < kWidth<T>; ++i) {
      if (far[i]) y[i] = kQuarters ? std::cos(x[i]) : std::sin(x[i]);
    }
  }
  return y;
}

// The maths of slerp.h on vectors: a row to a lane.
template <class T>
struct Lanes {
  using Real = T;
  using Number = Vec<T>;
  static Vec<T> sqrt(Vec<T> x) { return MMFAST_LEVEL::sqrt<T>(x); }
  static Vec<T> acos(Vec<T> x) { return MMFAST_LEVEL::acos<T>(x); }
  static Vec<T> sin(Vec<T> x) { return wave<0, T>(x); }
  static Vec<T> cos(Vec<T> x) { return wave<1, T>(x); }
  // each once in the code, so that a lane's bits do not hang on which lanes stand beside it
  template <class First, class Second>
  static Vec<T> either(Ints<T> where, First first, Second second) {
    const Vec<T> yes = any<T>(where) ? first() : Vec<T>{};
    const Vec<T> no = all<T>(where) ? Vec<T>{} : second();
    return where ? yes : no;
  }
};

}  // namespace mmfast::MMFAST_LEVEL

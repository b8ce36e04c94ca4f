#pragma once
#include <cmath>

#include "here.h"

// The two weights of slerp and their derivatives: the CPU's and CUDA's one source.
//   m = k1 a + k2 b,  k1 = sin(lam theta) / sin(theta),  k2 = the same of 1 - lam,
//   theta = arccos(c),  c = <a, b>
namespace mmfast::slerp {

// The maths that weights are made of, for one row a number. cpu/trig.h has the same for a vector
// of rows. `either` asks both only where numbers hold several rows that differ.
template <class T>
struct Scalar {
  using Real = T;
  using Number = T;
  MMFAST_HERE static T sqrt(T x) { return std::sqrt(x); }
  MMFAST_HERE static T acos(T x) { return std::acos(x); }
  MMFAST_HERE static T sin(T x) { return std::sin(x); }
  MMFAST_HERE static T cos(T x) { return std::cos(x); }
  template <class First, class Second>
  MMFAST_HERE static T either(bool where, First first, Second second) {
    return where ? first() : second();
  }
};

// (y - sin y) / y^3: by its series where the difference would cancel.
template <class Maths, class V = typename Maths::Number>
MMFAST_HERE V sine_rest(V y) {
  using T = typename Maths::Real;
  const V z = y * y;
  return Maths::either(
      z > T(2.25), [&] { return (y - Maths::sin(y)) / (z * y); },
      [&] {
        // from 1/21!, whose next term is below 1e-17 here
        V sum = T(1) / T(121645100408832000.0) - z * (T(1) / T(51090942171709440000.0));
        sum = T(1) / T(355687428096000.0) - z * sum;
        sum = T(1) / T(1307674368000.0) - z * sum;
        sum = T(1) / T(6227020800.0) - z * sum;
        sum = T(1) / T(39916800.0) - z * sum;
        sum = T(1) / T(362880.0) - z * sum;
        sum = T(1) / T(5040.0) - z * sum;
        sum = T(1) / T(120.0) - z * sum;
        return T(1) / T(6.0) - z * sum;
      });
}

template <class Maths>
struct Angle {
  using T = typename Maths::Real;
  using V = typename Maths::Number;
  V c, theta, sine, ratio;  // ratio = theta / sine, 1 at 0

  // c above 1 by rounding counts as 1. Towards c = -1 the weights grow without bound; c is kept
  // one rounding above it, so they stay below 1 / sqrt(2 eps): 2e3 in f32, 5e7 in f64.
  MMFAST_HERE explicit Angle(V dot) {
    const T lowest = T(-1) + (sizeof(T) == 8 ? T(2.220446049250313e-16) : T(1.1920929e-07));
    c = dot < lowest ? lowest : dot > T(1) ? T(1) : dot;
    theta = Maths::acos(c);
    // from c itself: the sine of a rounded angle near pi has lost what 1 + c still knows
    sine = Maths::sqrt((T(1) - c) * (T(1) + c));
    ratio = theta == T(0) ? T(1) : theta / sine;
  }

  // sin(lam theta) / sin(theta)
  MMFAST_HERE V weight(V lam) const {
    return Maths::either(theta == T(0), [&] { return lam; }, [&] { return weight_apart(lam); });
  }
  // the same where theta > 0
  MMFAST_HERE V weight_apart(V lam) const {
    return Maths::either(
        lam > T(0.5),
        [&] {
          // sin(theta - rest): 1 at lam = 1 whatever the angle, as the other is 0 at lam = 0
          const V rest = (T(1) - lam) * theta;
          return Maths::cos(rest) - c * Maths::sin(rest) / sine;
        },
        [&] { return Maths::sin(lam * theta) / sine; });
  }
  // its derivative by lam
  MMFAST_HERE V weight_by_lam(V lam) const { return Maths::cos(lam * theta) * ratio; }
  // its derivative by c: -[lam cos(lam theta) sin(theta) - sin(lam theta) cos(theta)] /
  // sin^3(theta), for small angles with the terms that cancel taken out; -lam (1 - lam^2) / 3 at 0
  MMFAST_HERE V weight_by_c(V lam) const {
    const V plus = T(1) + lam, minus = T(1) - lam;
    return Maths::either(
        theta > T(1),
        [&] {  // as sines of sums: 0 at lam = 0 and 1 whatever the angle
          const V sines = minus * Maths::sin(plus * theta) - plus * Maths::sin(minus * theta);
          return T(0.5) * sines / (sine * sine * sine);
        },
        [&] {
          const V rest = plus * plus * sine_rest<Maths>(plus * theta) -
                         minus * minus * sine_rest<Maths>(minus * theta);
          return T(-0.5) * plus * minus * rest * ratio * ratio * ratio;
        });
  }
};

}  // namespace mmfast::slerp

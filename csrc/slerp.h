#pragma once
#include <cmath>

// The two weights of slerp and their derivatives, for one row; the CPU's and CUDA's one source.
//   m = k1 a + k2 b,  k1 = sin(lam theta) / sin(theta),  k2 = the same of 1 - lam,
//   theta = arccos(c),  c = <a, b>
#if defined(__CUDACC__)
#define MMFAST_HERE __host__ __device__ inline
#else
#define MMFAST_HERE inline
#endif

namespace mmfast::slerp {

// (y - sin y) / y^3: by its series where the difference would cancel.
template <class T>
MMFAST_HERE T sine_rest(T y) {
  const T z = y * y;
  if (z > T(2.25)) return (y - std::sin(y)) / (z * y);
  T sum = T(1) / T(51090942171709440000.0);  // 1/21!, whose next term is below 1e-17 here
  sum = T(1) / T(121645100408832000.0) - z * sum;
  sum = T(1) / T(355687428096000.0) - z * sum;
  sum = T(1) / T(1307674368000.0) - z * sum;
  sum = T(1) / T(6227020800.0) - z * sum;
  sum = T(1) / T(39916800.0) - z * sum;
  sum = T(1) / T(362880.0) - z * sum;
  sum = T(1) / T(5040.0) - z * sum;
  sum = T(1) / T(120.0) - z * sum;
  return T(1) / T(6.0) - z * sum;
}

template <class T>
struct Angle {
  T c, theta, sine, ratio;  // ratio = theta / sine, 1 at 0

  // c above 1 by rounding counts as 1. Towards c = -1 the weights grow without bound; c is kept
  // one rounding above it, so they stay below 1 / sqrt(2 eps): 2e3 in f32, 5e7 in f64.
  MMFAST_HERE explicit Angle(T dot) {
    const T lowest = T(-1) + (sizeof(T) == 8 ? T(2.220446049250313e-16) : T(1.1920929e-07));
    c = dot < lowest ? lowest : dot > T(1) ? T(1) : dot;
    theta = std::acos(c);
    // from c itself: the sine of a rounded angle near pi has lost what 1 + c still knows
    sine = std::sqrt((T(1) - c) * (T(1) + c));
    ratio = theta == T(0) ? T(1) : theta / sine;
  }

  // sin(lam theta) / sin(theta)
  MMFAST_HERE T weight(T lam) const {
    if (theta == T(0)) return lam;
    if (!(lam > T(0.5))) return std::sin(lam * theta) / sine;
    // sin(theta - rest): 1 at lam = 1 whatever the angle, as the other is 0 at lam = 0
    const T rest = (T(1) - lam) * theta;
    return std::cos(rest) - c * std::sin(rest) / sine;
  }
  // its derivative by lam
  MMFAST_HERE T weight_by_lam(T lam) const { return std::cos(lam * theta) * ratio; }
  // its derivative by c: -[lam cos(lam theta) sin(theta) - sin(lam theta) cos(theta)] /
  // sin^3(theta), for small angles with the terms that cancel taken out; -lam (1 - lam^2) / 3 at 0
  MMFAST_HERE T weight_by_c(T lam) const {
    const T plus = T(1) + lam, minus = T(1) - lam;
    if (theta > T(1)) {  // as sines of sums: 0 at lam = 0 and 1 whatever the angle
      return T(0.5) * (minus * std::sin(plus * theta) - plus * std::sin(minus * theta)) /
             (sine * sine * sine);
    }
    const T rest = plus * plus * sine_rest(plus * theta) - minus * minus * sine_rest(minus * theta);
    return T(-0.5) * plus * minus * rest * ratio * ratio * ratio;
  }
};

}  // namespace mmfast::slerp

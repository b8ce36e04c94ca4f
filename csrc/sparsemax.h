#pragma once
#include <cmath>

#include "here.h"

// The threshold of sparsemax: the CPU's and CUDA's one source. p = max(x - tau, 0) with a sum of 1.
// tau rises by Newton's steps on sum max(x - tau, 0) - 1, which is convex and made of straight
// pieces, so that none goes too far and the last one is exact. Sums are f64, of entries less the
// largest: for f32 scores they are exact as a rule, and ties with them.
namespace mmfast::sparsemax {

// What entries are made smaller by: the largest, or 0 in a row of -inf alone.
template <class T>
MMFAST_HERE T shift_of(T largest) {
  return largest == T(-INFINITY) ? T(0) : largest;
}

struct Newton {
  // of entries less their shift: the largest is 0, and alone it would put the threshold at -1
  double tau = -1, count = 0;

  // Given the sum, the number and the smallest of the entries above tau: whether they still are
  // when tau has moved, which is then the root. NaN counts as above, and makes a tau of NaN.
  MMFAST_HERE bool ends(double sum, double above, double smallest) {
    count = above;
    if (count == 0) return true;
    const double next = (sum - 1) / count;
    tau = next <= tau ? tau : next;  // a step that rounding turns back is none
    return !(smallest <= tau);
  }
};

// What decides over the entries of a row. `lowest` is the smallest of the support: a threshold in
// one f32 would round, and so move entries across.
template <class T>
struct Threshold {
  T lowest, high, low;  // high + low: tau, for entries as they are
  T rest;               // what entries outside of the support become: 0, or NaN throughout

  MMFAST_HERE Threshold(const Newton& newton, T shift, T smallest) {
    high = T(shift + newton.tau);
    low = T(newton.tau - (high - double(shift)));
    lowest = newton.count == 0 ? T(INFINITY) : smallest;
    rest = newton.tau == newton.tau ? T(0) : T(newton.tau);
    if (rest != rest) lowest = rest;
  }
};

}  // namespace mmfast::sparsemax

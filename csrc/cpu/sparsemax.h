#pragma once
#include "../sparsemax.h"
#include "elements.h"

// sparsemax of a row in memory, whichever op made it: its threshold, and the weights by it.
namespace mmfast::MMFAST_LEVEL {

template <class E>
using Threshold = sparsemax::Threshold<Wide<E>>;

// What a weight of the support is at least, so that rounding never takes an entry out of it.
template <class E>
constexpr Wide<E> kLeast =
    std::is_same_v<E, F16> ? Wide<E>(0x1p-24) : std::numeric_limits<Wide<E>>::min();

template <class E, class T = Wide<E>>
[[gnu::always_inline]] inline Vec<T> weights(const Threshold<E>& t, Vec<T> x) {
  const Vec<T> p = larger<T>(x - t.high - t.low, broadcast(kLeast<E>));
  return select<T>(x >= t.lowest, p, broadcast(t.rest));
}

// A vector as doubles.
template <class T>
constexpr int kDoubles = sizeof(double) / sizeof(T);
template <class T>
struct Doubles {
  Vec<double> parts[kDoubles<T>];
};
template <class T>
[[gnu::always_inline]] inline Doubles<T> doubles(Vec<T> x) {
  if constexpr (sizeof(T) == 8) {
    return {x};
  } else {
    typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
    Half halves[2];
    std::memcpy(halves, &x, sizeof(x));
    return {__builtin_convertvector(halves[0], Vec<double>),
            __builtin_convertvector(halves[1], Vec<double>)};
  }
}

template <class T>
double sum_of(const Vec<double> (&parts)[kDoubles<T>]) {
  double sum = 0;
  for (const Vec<double>& part : parts) sum += sum_of_lanes<double>(part);
  return sum;
}

// Less than every number.
template <class E>
constexpr E kLowest = E(-kInf<Wide<E>>);
template <>
inline constexpr Bf16 kLowest<Bf16> = {0xff80};
template <>
inline constexpr F16 kLowest<F16> = {0xfc00};

// visit(vector, chain) for a row; -inf stands behind its end. What is carried from vector to vector
// may run in kChains chains.
constexpr int kChains = 4;
template <class E, class Visit>
[[gnu::always_inline]] inline void each_vector(const E* row, long n, Visit visit) {
  constexpr long kSpans = kChains / kParts<E>;
  const auto span = [&](const E* from, int chain) __attribute__((always_inline)) {
    const Span<E> x = read(from);
    for (int p = 0; p < kParts<E>; ++p) visit(x.parts[p], chain + p);
  };
  long d = 0;
  for (; d + kSpans * kSpan<E> <= n; d += kSpans * kSpan<E>) {
#pragma GCC unroll 4
    for (long s = 0; s < kSpans; ++s) span(row + d + s * kSpan<E>, int(s) * kParts<E>);
  }
  for (; d + kSpan<E> <= n; d += kSpan<E>) span(row + d, 0);
  if (d == n) return;
  E end[kSpan<E>];
  std::fill_n(end, kSpan<E>, kLowest<E>);
  std::copy(row + d, row + n, end);
  span(end, 0);
}

// The largest entries of a row, of all that stand in one lane of one chain; NaN is passed over.
template <class T>
struct Largest {
  T lanes[kChains * kWidth<T>];
  T all;
};
template <class E, class T = Wide<E>>
Largest<T> largest(const E* row, long n) {
  Vec<T> best[kChains];
  std::fill_n(best, kChains, broadcast(-kInf<T>));
  each_vector(row, n, [&](Vec<T> x, int chain) __attribute__((always_inline)) {
    best[chain] = larger<T>(x, best[chain]);
  });
  Largest<T> found;
  for (int c = 0; c < kChains; ++c) store(found.lanes + c * kWidth<T>, best[c]);
  const Vec<T> all = larger<T>(larger<T>(best[0], best[1]), larger<T>(best[2], best[3]));
  found.all = largest_lane<T>(all);
  return found;
}

// Scalars of scratch that the threshold of a row of n takes.
template <class E>
constexpr long threshold_scratch(long n) {
  return round_up(n, kSpan<E>);
}

// Copies the vectors of a row that hold a candidate, an entry above tau, and says how many.
// Rounding takes no difference past a number: entries at tau may be among them. NaN is a candidate.
template <class E, class T = Wide<E>>
long keep_candidates(double tau, T shift, const E* row, long n, T* kept) {
  long vectors = 0;
  each_vector(row, n, [&](Vec<T> x, int) __attribute__((always_inline)) {
    store(kept + vectors * kWidth<T>, x);
    vectors += !all<T>(x - shift < T(tau));
  });
  return vectors;
}

// Takes Newton's steps to their end over some vectors; returns the smallest entry above the root.
template <class T>
T find_root(sparsemax::Newton& newton, T shift, const T* kept, long vectors) {
  constexpr int kParts = kDoubles<T>;
  constexpr double kNone = -kInf<double>;
  for (;;) {
    Vec<double> sums[kParts] = {}, counts[kParts] = {}, smallest[kParts];  // -x is, the largest
    std::fill_n(smallest, kParts, broadcast(kNone));
    for (long v = 0; v < vectors; ++v) {
      const Doubles<T> x = doubles<T>(load<T>(kept + v * kWidth<T>));
      for (int p = 0; p < kParts; ++p) {
        const Vec<double> z = x.parts[p] - double(shift);
        const Ints<double> above = ~(z <= newton.tau);
        sums[p] += select<double>(above, z, Vec<double>{});
        counts[p] += select<double>(above, broadcast(1.0), Vec<double>{});
        smallest[p] =
            larger<double>(select<double>(above, -x.parts[p], broadcast(kNone)), smallest[p]);
      }
    }
    const T lowest = -largest_lane<double>(larger<double>(smallest[0], smallest[kParts - 1]));
    if (newton.ends(sum_of<T>(sums), sum_of<T>(counts), double(lowest) - shift)) return lowest;
  }
}

// The threshold of row[0..n); scratch: threshold_scratch(n) scalars.
template <class E, class T = Wide<E>>
Threshold<E> find_threshold(const E* row, long n, T* scratch) {
  const Largest<T> found = largest(row, n);
  const T shift = sparsemax::shift_of(found.all);
  // the threshold of some entries is not above that of all: fewer candidates, and fewer steps
  sparsemax::Newton newton;
  find_root(newton, shift, found.lanes, kChains);
  const long vectors = keep_candidates(newton.tau, shift, row, n, scratch);
  const T lowest = find_root(newton, shift, scratch, vectors);
  return {newton, shift, lowest};
}

}  // namespace mmfast::MMFAST_LEVEL

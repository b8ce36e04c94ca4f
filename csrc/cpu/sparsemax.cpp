// sparsemax by rows: bound by memory where rows come from there. A row is read for its largest
// entry and stays in cache: for the vectors that hold candidates, whose copies Newton's steps
// visit, and for the weights. Its gradient takes two visits, both of the same row.
//   f32, bf16, f16 -> f32 weights, f64 sums;  f64 all through;  results in the input's type
#include "sparsemax.h"

#include "parallel.h"

namespace mmfast::MMFAST_LEVEL {
namespace {

// about what a thread takes in one turn
constexpr long kTurnBytes = 64 << 10;

// visit(i, thread) for all rows, several short ones in a turn.
template <class E, class Visit>
void each_row(const View& like, const Run& run, Visit visit) {
  const long turn = std::max<long>(1, kTurnBytes / (like.cols * long(sizeof(E))));
  for_each((like.rows + turn - 1) / turn, run, [&](long t, int thread) {
    const long end = std::min(like.rows, (t + 1) * turn);
    for (long i = t * turn; i < end; ++i) visit(i, thread);
    fence();
  });
}

// The mean of g over the support of p.
template <class E>
Wide<E> mean_of_support(const E* g, const E* p, long n) {
  using T = Wide<E>;
  Vec<double> sums[kParts<E>][kDoubles<T>] = {};
  Vec<T> counts[kParts<E>] = {};
  const auto add = [&](Span<E> up, Span<E> weights) __attribute__((always_inline)) {
    for (int part = 0; part < kParts<E>; ++part) {
      const Ints<T> where = weights.parts[part] > 0;
      const auto x = doubles<T>(select<T>(where, up.parts[part], Vec<T>{}));
      for (int d = 0; d < kDoubles<T>; ++d) sums[part][d] += x.parts[d];
      counts[part] += select<T>(where, broadcast<T>(1), Vec<T>{});
    }
  };
  long d = 0;
  for (; d + kSpan<E> <= n; d += kSpan<E>) add(read(g + d), read(p + d));
  if (d < n) add(read(g + d, n - d), read(p + d, n - d));
  double sum = 0, count = 0;
  for (int part = 0; part < kParts<E>; ++part) {
    sum += sum_of<T>(sums[part]);
    count += sum_of_lanes<T>(counts[part]);
  }
  return T(sum / count);
}

}  // namespace

void sparsemax_forward(View x, View out, const Run& run) {
  with_element(x.type, [&](auto element) {
    using E = decltype(element);
    const ResultRows<E> rows(out);
    const long scratch = threshold_scratch<E>(x.cols);
    const Buffer<Wide<E>> kept(scratch * run.threads);
    each_row<E>(x, run, [&](long i, int thread) {
      const E* row = &x.at<E>(i);
      const Threshold<E> threshold = find_threshold(row, x.cols, kept + thread * scratch);
      rows.put(i, [&](long d, long count) __attribute__((always_inline)) {
        Span<E> span = read(row + d, count);
        for (auto& part : span.parts) part = weights<E>(threshold, part);
        return span;
      });
    });
  });
}

void sparsemax_backward(View g, View p, View dx, const Run& run) {
  with_element(p.type, [&](auto element) {
    using E = decltype(element);
    using T = Wide<E>;
    const ResultRows<E> rows(dx);
    each_row<E>(p, run, [&](long i, int) {
      const E *up = &g.at<E>(i), *row = &p.at<E>(i);
      const T mean = mean_of_support(up, row, p.cols);
      rows.put(i, [&](long d, long count) __attribute__((always_inline)) {
        Span<E> x = read(up + d, count);
        const Span<E> w = read(row + d, count);
        for (int part = 0; part < kParts<E>; ++part) {
          // outside of the support the weight itself: 0, or the NaN of its row
          x.parts[part] = select<T>(w.parts[part] > 0, x.parts[part] - mean, w.parts[part]);
        }
        return x;
      });
    });
  });
}

}  // namespace mmfast::MMFAST_LEVEL

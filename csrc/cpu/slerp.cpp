// slerp by rows: bound by memory, which is read and written once. Rows come in blocks, a row to the
// lane of a vector: the inner products of a block, from them the weights of all its rows at once,
// then its results, from the cache that the first visit filled.
//   f32, bf16, f16 in -> f32 arithmetic;  f64 in -> f64 arithmetic;  results in the input's type
#include "../slerp.h"

#include "elements.h"
#include "parallel.h"
#include "trig.h"

namespace mmfast::MMFAST_LEVEL {
namespace {

// What a block takes of a matrix, and about what a thread takes in one turn: little enough for a
// cache to hold it of every operand.
constexpr long kBlockBytes = 32 << 10;

// sum + the products of a span, all parts of a lane in its one sum
template <class E>
[[gnu::always_inline]] inline Vec<Wide<E>> add_products(Vec<Wide<E>> sum, const E* a, const E* b) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<E, Bf16>) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)load<float>(a),
                                        (__m512bh)load<float>(b));
  }
#endif
  const Span<E> x = read(a), y = read(b);
  for (int p = 0; p < kParts<E>; ++p) sum += x.parts[p] * y.parts[p];
  return sum;
}

// <row i, row j> for each j < i of kRows rows: (1, 0), then (2, 0) and (2, 1).
template <class T, int kRows>
struct Products {
  static constexpr int kPairs = kRows * (kRows - 1) / 2;
  Vec<T> of[kPairs] = {};
};

// sums + the products of the spans at d
template <class E, int kRows>
[[gnu::always_inline]] inline void add_pairs(Products<Wide<E>, kRows>& sums, const E* const* rows,
                                             long d) {
#pragma GCC unroll 2
  for (int i = 1; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < i; ++j) {
      Vec<Wide<E>>& sum = sums.of[i * (i - 1) / 2 + j];
      sum = add_products(sum, rows[i] + d, rows[j] + d);
    }
  }
}

// The products of one row of each matrix, still to be summed over lanes; each row is read once.
template <class E, int kRows>
Products<Wide<E>, kRows> spread_products(const E* const (&rows)[kRows], long D) {
  constexpr long kSums = 4, kStep = kSpan<E>;
  Products<Wide<E>, kRows> sums[kSums];
  long d = 0;
  for (; d + kSums * kStep <= D; d += kSums * kStep) {
#pragma GCC unroll 4
    for (long v = 0; v < kSums; ++v) add_pairs<E>(sums[v], rows, d + v * kStep);
  }
  for (; d + kStep <= D; d += kStep) add_pairs<E>(sums[0], rows, d);
  if (d < D) {
    E ends[kRows][kStep] = {};
    const E* rest[kRows];
    for (int i = 0; i < kRows; ++i) {
      std::memcpy(ends[i], rows[i] + d, (D - d) * sizeof(E));
      rest[i] = ends[i];
    }
    add_pairs<E>(sums[1], rest, 0);
  }
  for (int p = 0; p < sums[0].kPairs; ++p) {
    sums[0].of[p] = (sums[0].of[p] + sums[1].of[p]) + (sums[2].of[p] + sums[3].of[p]);
  }
  return sums[0];
}

// Rows that are taken together: `count` of them, at most one a lane.
struct Block {
  long first, count;
};

// The products of a block's rows, a row to a lane; zeros behind them.
template <class E, int kRows, class T = Wide<E>>
Products<T, kRows> products(const View (&matrices)[kRows], Block block) {
  Products<T, kRows> all;
  Vec<T> spread[all.kPairs][kWidth<T>] = {};
  for (long r = 0; r < block.count; ++r) {
    const E* rows[kRows];
    for (int i = 0; i < kRows; ++i) rows[i] = &matrices[i].template at<E>(block.first + r);
    const auto one = spread_products<E>(rows, matrices[0].cols);
    for (int p = 0; p < all.kPairs; ++p) spread[p][r] = one.of[p];
  }
  for (int p = 0; p < all.kPairs; ++p) all.of[p] = sums_of<T>(spread[p]);
  return all;
}

// A block's part of a column; zeros behind it.
template <class T>
Vec<T> column(const View& x, Block block) {
  T lanes[kWidth<T>] = {};
  for (long r = 0; r < block.count; ++r) lanes[r] = x.at<T>(block.first + r);
  return load<T>(lanes);
}

// x a + y b
template <class E>
[[gnu::always_inline]] inline Span<E> mix(Wide<E> x, Span<E> a, Wide<E> y, Span<E> b) {
  for (int p = 0; p < kParts<E>; ++p) a.parts[p] = x * a.parts[p] + y * b.parts[p];
  return a;
}

// Row i of out = x a + y b
template <class E>
void combine(const ResultRows<E>& out, long i, Wide<E> x, const E* a, Wide<E> y, const E* b) {
  out.put(i, [&](long d, long count) __attribute__((always_inline)) {
    return mix(x, read(a + d, count), y, read(b + d, count));
  });
}

// visit(block) for all rows, in blocks of as many as a cache holds. How many does not show in the
// bits: a row's are the same whatever stands beside it.
template <class E, class Visit>
void each_block(const View& like, const Run& run, Visit visit) {
  const long fit = kBlockBytes / (like.cols * long(sizeof(E)));
  const long rows = std::clamp<long>(fit, 1, kWidth<Wide<E>>);
  const long turn = std::max<long>(1, fit / rows) * rows;
  for_each((like.rows + turn - 1) / turn, run, [&](long t, int) {
    const long end = std::min(like.rows, (t + 1) * turn);
    for (long i = t * turn; i < end; i += rows) visit(Block{i, std::min(rows, end - i)});
    fence();
  });
}

// What follows from the cosines and lams of a block's rows.
template <class T>
struct Weights {
  Vec<T> k1, k2;
};
template <class T>
Weights<T> weights(Vec<T> c, Vec<T> lam) {
  const slerp::Angle<Lanes<T>> angle(c);
  return {angle.weight(lam), angle.weight(1 - lam)};
}

template <class T>
struct Slopes {
  Weights<T> value, by_c, by_lam;
};
template <class T>
Slopes<T> slopes(Vec<T> c, Vec<T> lam, bool rows, bool lams) {
  const slerp::Angle<Lanes<T>> angle(c);
  const Vec<T> rest = 1 - lam;
  Slopes<T> s = {};
  if (rows) {
    s.value = {angle.weight(lam), angle.weight(rest)};
    s.by_c = {angle.weight_by_c(lam), angle.weight_by_c(rest)};
  }
  if (lams) s.by_lam = {angle.weight_by_lam(lam), -angle.weight_by_lam(rest)};
  return s;
}

}  // namespace

void slerp_forward(View a, View b, View lam, View out, const Run& run) {
  with_element(a.type, [&](auto element) {
    using E = decltype(element);
    using T = Wide<E>;
    const ResultRows<E> rows(out);
    each_block<E>(a, run, [&](Block block) {
      const auto [c] = products<E>({a, b}, block).of;
      const auto [k1, k2] = weights<T>(c, column<T>(lam, block));
      for (long r = 0, i = block.first; r < block.count; ++r, ++i) {
        combine(rows, i, k1[r], &a.at<E>(i), k2[r], &b.at<E>(i));
      }
    });
  });
}

void slerp_backward(View g, View a, View b, View lam, View da, View db, View dlam, const Run& run) {
  with_element(a.type, [&](auto element) {
    using E = decltype(element);
    using T = Wide<E>;
    const ResultRows<E> a_rows(da), b_rows(db);
    each_block<E>(a, run, [&](Block block) {
      const auto [along_a, along_b, c] = products<E>({g, a, b}, block).of;
      const auto s = slopes<T>(c, column<T>(lam, block), da || db, bool(dlam));
      const Vec<T> g_c = along_a * s.by_c.k1 + along_b * s.by_c.k2;
      const Vec<T> g_lam = along_a * s.by_lam.k1 + along_b * s.by_lam.k2;
      for (long r = 0, i = block.first; r < block.count; ++r, ++i) {
        const E *up = &g.at<E>(i), *x = &a.at<E>(i), *y = &b.at<E>(i);
        if (da) combine(a_rows, i, s.value.k1[r], up, g_c[r], y);
        if (db) combine(b_rows, i, s.value.k2[r], up, g_c[r], x);
        if (dlam) dlam.at<T>(i) = g_lam[r];
      }
    });
  });
}

}  // namespace mmfast::MMFAST_LEVEL

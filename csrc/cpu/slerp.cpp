// slerp by rows: bound by memory, which is read and written once. A row's inner products and its
// result come from the cache that the first of them filled.
//   f32, bf16, f16 in -> f32 arithmetic;  f64 in -> f64 arithmetic;  results in the input's type
#include "../slerp.h"

#include "elements.h"
#include "parallel.h"

namespace mmfast::MMFAST_LEVEL {
namespace {

// What one turn reads of a matrix: enough to be worth handing out, little enough for a cache.
constexpr long kChunkBytes = 64 << 10;
// A result larger than this leaves the caches before anybody reads it.
constexpr long kPastBytes = 8 << 20;

// sum + products of kSpan neighbours
template <class E>
constexpr long kSpan = kWidth<Wide<E>>;
template <class E>
[[gnu::always_inline]] inline Vec<Wide<E>> add_products(Vec<Wide<E>> sum, const E* a, const E* b) {
  return sum + read(a) * read(b);
}
#if defined(__AVX512BF16__)
template <>
constexpr long kSpan<Bf16> = 32;
template <>
[[gnu::always_inline]] inline Vec<float> add_products(Vec<float> sum, const Bf16* a,
                                                      const Bf16* b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)load<float>(a),
                                      (__m512bh)load<float>(b));
}
#endif

// <a, b>, in a few sums at once.
template <class E>
Wide<E> inner(const E* a, const E* b, long D) {
  using T = Wide<E>;
  constexpr long kSums = 4, kStep = kSpan<E>;
  Vec<T> sums[kSums] = {};
  long d = 0;
  for (; d + kSums * kStep <= D; d += kSums * kStep) {
#pragma GCC unroll 4
    for (long v = 0; v < kSums; ++v) {
      sums[v] = add_products(sums[v], a + d + v * kStep, b + d + v * kStep);
    }
  }
  for (; d + kStep <= D; d += kStep) sums[0] = add_products(sums[0], a + d, b + d);
  if (d < D) {
    E rest[2][kStep] = {};
    std::memcpy(rest[0], a + d, (D - d) * sizeof(E));
    std::memcpy(rest[1], b + d, (D - d) * sizeof(E));
    sums[1] = add_products(sums[1], rest[0], rest[1]);
  }
  Vec<T> all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma GCC unroll 4
  for (size_t n = kWidth<T> / 2; n > 0; n /= 2) {
    all += shuffle<T>(all, all, [n](size_t l) { return (l + n) % kWidth<T>; });
  }
  return all[0];
}

// out = x a + y b
template <bool kPast, class E>
void combine(Wide<E> x, const E* a, Wide<E> y, const E* b, E* out, long D) {
  constexpr int kStep = kWidth<Wide<E>>;
  long d = 0;
  for (; d + kStep <= D; d += kStep) write<kPast>(out + d, x * read(a + d) + y * read(b + d));
  if (d < D) write(out + d, x * read(a + d, D - d) + y * read(b + d, D - d), D - d);
}

// Where rows of the result go, and how.
template <class E>
struct Rows {
  View view;
  bool past;

  explicit Rows(const View& v) : view(v) {
    const auto aligned = [](long bytes) { return bytes % kVectorBytes == 0; };
    past = v.rows * v.cols * long(sizeof(E)) > kPastBytes && aligned(v.cols * sizeof(E)) &&
           aligned(v.row_stride * sizeof(E)) && aligned(reinterpret_cast<uintptr_t>(v.data));
  }
  void put(long i, Wide<E> x, const E* a, Wide<E> y, const E* b) const {
    E* out = &view.at<E>(i);
    past ? combine<true>(x, a, y, b, out, view.cols) : combine<false>(x, a, y, b, out, view.cols);
  }
};

// row(i) for every row of `like`.
template <class Row>
void each_row(const View& like, long element_size, const Run& run, Row row) {
  const long step = std::max<long>(1, kChunkBytes / (like.cols * element_size));
  for_each((like.rows + step - 1) / step, run, [&](long chunk, int) {
    const long end = std::min(like.rows, (chunk + 1) * step);
    for (long i = chunk * step; i < end; ++i) row(i);
    fence();
  });
}

// What follows from a row's cosine and lam; inlined into this level whole, down to slerp.h.
template <class T>
struct Weights {
  T k1, k2;
};
template <class T>
[[gnu::flatten]] Weights<T> weights(T c, T lam) {
  const slerp::Angle<T> angle(c);
  return {angle.weight(lam), angle.weight(1 - lam)};
}

template <class T>
struct Slopes {
  Weights<T> value, by_c, by_lam;
};
template <class T>
[[gnu::flatten]] Slopes<T> slopes(T c, T lam, bool rows, bool lams) {
  const slerp::Angle<T> angle(c);
  const T rest = 1 - lam;
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
    const Rows<E> rows(out);
    each_row(a, sizeof(E), run, [&](long i) {
      const E *x = &a.at<E>(i), *y = &b.at<E>(i);
      const auto [k1, k2] = weights(inner(x, y, a.cols), lam.at<T>(i));
      rows.put(i, k1, x, k2, y);
    });
  });
}

void slerp_backward(View g, View a, View b, View lam, View da, View db, View dlam, const Run& run) {
  with_element(a.type, [&](auto element) {
    using E = decltype(element);
    using T = Wide<E>;
    const Rows<E> a_rows(da), b_rows(db);
    each_row(a, sizeof(E), run, [&](long i) {
      const E *up = &g.at<E>(i), *x = &a.at<E>(i), *y = &b.at<E>(i);
      const T along_a = inner(up, x, a.cols), along_b = inner(up, y, a.cols);
      const auto s = slopes(inner(x, y, a.cols), lam.at<T>(i), da || db, bool(dlam));
      if (dlam) dlam.at<T>(i) = along_a * s.by_lam.k1 + along_b * s.by_lam.k2;
      const T g_c = along_a * s.by_c.k1 + along_b * s.by_c.k2;
      if (da) a_rows.put(i, s.value.k1, up, g_c, y);
      if (db) b_rows.put(i, s.value.k2, up, g_c, x);
    });
  });
}

}  // namespace mmfast::MMFAST_LEVEL

#pragma once
#include <algorithm>
#include <vector>

#include "elements.h"

// Rows picked by the codes of a weight that is not 0, however few or many, and summed.
namespace mmfast::MMFAST_LEVEL {

// So much of a row's width at once: sums of many rows stay in a near cache.
constexpr long kChunk = 128;

// The codes of a weight that is not 0 (NaN is not), by samples.
template <class T>
class Support {
 public:
  explicit Support(const View& weights)
      : weights_(weights), codes_(weights.rows * weights.cols), counts_(weights.rows) {}

  void find(long b) {
    const T* const w = &weights_.at<T>(b);
    int32_t* const codes = codes_ + b * weights_.cols;
    long count = 0, c = 0;
    for (; c + kWidth<T> <= weights_.cols; c += kWidth<T>) {
      if (all<T>(load<T>(w + c) == 0)) continue;
      for (long u = c; u < c + kWidth<T>; ++u) {
        if (w[u] != 0) codes[count++] = int32_t(u);
      }
    }
    for (; c < weights_.cols; ++c) {
      if (w[c] != 0) codes[count++] = int32_t(c);
    }
    counts_[b] = count;
  }

  long count(long b) const { return counts_[b]; }

  // Codes in [begin, end), as numbers in the sample's list.
  struct Range {
    const int32_t* codes;
    long begin, end;
  };
  Range among(long b, long begin, long end) const {
    const int32_t* const codes = codes_ + b * weights_.cols;
    const auto place = [&](long c) {
      return std::lower_bound(codes, codes + counts_[b], c) - codes;
    };
    return {codes, place(begin), place(end)};
  }
  Range all_of(long b) const { return {codes_ + b * weights_.cols, 0, counts_[b]}; }

  // Whether so many pairs of samples and codes have a weight that a product of all is cheaper.
  bool dense(long first, long last, long begin, long end) const {
    long pairs = 0;
    for (long b = first; b < last; ++b) {
      const Range range = among(b, begin, end);
      pairs += range.end - range.begin;
    }
    return kPicked * pairs > (last - first) * (end - begin);
  }

 private:
  // How many times as long picking a pair takes as multiplying it. On a Xeon a backward pass takes
  // as long either way where a weight is left in 0.25 to 0.40 of the pairs: float32 and bfloat16, 8
  // and 64 samples, 4,096 and 16,384 codes.
  static constexpr long kPicked = 3;

  View weights_;
  Buffer<int32_t> codes_;
  std::vector<long> counts_;
};

// The part of a row from d on, at most kChunk wide: body(place, span, count) by spans, whose parts
// lie one after another in a sum.
template <class E, class Body>
[[gnu::always_inline]] inline void each_span(const E* row, long count, Body body) {
  if (count == kChunk) {
#pragma GCC unroll 8
    for (long d = 0; d < kChunk; d += kSpan<E>) body(d, read(row + d), kSpan<E>);
    return;
  }
  for (long d = 0; d < count; d += kSpan<E>) {
    const long here = std::min(kSpan<E>, count - d);
    body(d, read(row + d, here), here);
  }
}

// sum += factor * row
template <class E>
[[gnu::always_inline]] inline void add_row(Wide<E>* sum, Wide<E> factor, const E* row, long count) {
  using T = Wide<E>;
  each_span(row, count, [&](long d, Span<E> x, long) __attribute__((always_inline)) {
    for (int p = 0; p < kParts<E>; ++p) {
      T* to = sum + d + p * kWidth<T>;
      store(to, load<T>(to) + factor * x.parts[p]);
    }
  });
}

// out = factor * row, as parts
template <class E>
[[gnu::always_inline]] inline void widen_row(Wide<E>* out, Wide<E> factor, const E* row,
                                             long count) {
  using T = Wide<E>;
  each_span(row, count, [&](long d, Span<E> x, long) __attribute__((always_inline)) {
    for (int p = 0; p < kParts<E>; ++p) store(out + d + p * kWidth<T>, factor * x.parts[p]);
  });
}

// row = factor * sum, rounded
template <class E>
void write_sum(E* row, const Wide<E>* sum, Wide<E> factor, long count) {
  using T = Wide<E>;
  for (long d = 0; d < count; d += kSpan<E>) {
    Span<E> x;
    for (int p = 0; p < kParts<E>; ++p) x.parts[p] = factor * load<T>(sum + d + p * kWidth<T>);
    write(row + d, x, std::min(kSpan<E>, count - d));
  }
}

// Products of sums, in their own type.
template <class T>
using Plain = std::conditional_t<sizeof(T) == 8, F64, F32>;

}  // namespace mmfast::MMFAST_LEVEL

#pragma once
#include <cmath>
#include <limits>

#include "sweep.h"

// Sums of exponentials that neither overflow nor lose a row, from tiles of scores in registers.
// Scores are kept in units of log 2 (exp is 2^x). A strip takes one exponential a score, relative
// to a guess at its maximum; where that would lose a row or a column it takes two, exactly.
namespace mmfast::MMFAST_LEVEL {

// bf16 results need no more of the exponential than their rounding shows
template <class P>
constexpr int kForwardDegree = P::kPack == 2 ? 4 : 5;

// sums below this, relative to the strip's maximum, may have lost terms to underflow
template <class T>
constexpr T kFaint = sizeof(T) == 8 ? 0x1p-500 : 0x1p-64;
// and above this, relative to a guess at it, might in the end overflow
template <class T>
constexpr T kLoud = sizeof(T) == 8 ? 0x1p800 : 0x1p96;

// sum 2^x as sum * 2^top; x = +inf counts as top = +inf, sum = their number.
template <class T>
struct LogSums {
  Buffer<T> top, sum;
  explicit LogSums(long n) : top(n + kTileCols<T>), sum(n + kTileCols<T>) {
    std::fill_n(static_cast<T*>(top), n + kTileCols<T>, -kInf<T>);
    std::fill_n(static_cast<T*>(sum), n + kTileCols<T>, T{0});
  }

  template <int kDegree>
  void add(long i, Vec<T> top1, Vec<T> sum1) {
    const Vec<T> top0 = load<T>(top + i), best = larger<T>(top0, top1);
    // equal ones keep the factor 1, also at infinity
    const Vec<T> by0 = exp2<kDegree, T>(select<T>(top0 == best, Vec<T>{}, top0 - best));
    const Vec<T> by1 = exp2<kDegree, T>(select<T>(top1 == best, Vec<T>{}, top1 - best));
    store<T>(top + i, best);
    store<T>(sum + i, load<T>(sum + i) * by0 + sum1 * by1);
  }

  struct Total {
    double top, sum;
    double log() const { return (top + std::log2(sum)) * kLn2; }
  };
  // of `copies` such sums that stand `stride` apart
  Total total(long i, long copies = 1, long stride = 0) const {
    Total all{top[i], 0};
    for (long c = 1; c < copies; ++c) all.top = std::max<double>(all.top, top[i + c * stride]);
    for (long c = 0; c < copies; ++c) {
      const double t = top[i + c * stride];
      all.sum += sum[i + c * stride] * (t == all.top ? 1 : std::exp2(t - all.top));
    }
    return all;
  }
};

// Adds one strip of scores, [round_up(count, kWidth), kTileCols] with -inf behind `count` and
// `cols`, with a maximum for every row and every column. True if one for all of them would have
// done.
template <int kDegree, class T>
bool add_exactly(const T* scores, long count, long cols, LogSums<T>& rows, long i,
                 LogSums<T>* columns, long column) {
  constexpr long kRows = kWidth<T>, kCols = kTileCols<T>;
  const long whole = round_up(count, kRows);
  const auto score = [&](long r, int v) { return load<T>(scores + r * kCols + v * kRows); };
  const auto power = [](Vec<T> x, Vec<T> top) {
    return exp2<kDegree, T>(select<T>(x == top, Vec<T>{}, x - top));
  };
  // a row of -inf alone: subtract 0, so exp never sees inf - inf
  const auto base = [](Vec<T> top) { return select<T>(top == -kInf<T>, Vec<T>{}, top); };
  Vec<T> best[kTileVectors], sums[kTileVectors] = {};
  T highest = -kInf<T>, lowest = kInf<T>;
  for (int v = 0; v < kTileVectors; ++v) best[v] = broadcast(-kInf<T>);
  for (long r0 = 0; r0 < whole; r0 += kRows) {
    Vec<T> tops = {}, row[kRows];
    for (int r = 0; r < kRows; ++r) {
      Vec<T> top = broadcast(-kInf<T>);
      for (int v = 0; v < kTileVectors; ++v) {
        top = larger<T>(score(r0 + r, v), top);
        best[v] = larger<T>(score(r0 + r, v), best[v]);
      }
      tops[r] = largest_lane<T>(top);
      if (r0 + r < count) {
        highest = std::max(highest, tops[r]);
        lowest = std::min(lowest, tops[r]);
      }
      row[r] = Vec<T>{};
      for (int v = 0; v < kTileVectors; ++v) {
        row[r] += power(score(r0 + r, v), base(broadcast<T>(tops[r])));
      }
    }
    rows.template add<kDegree>(i + r0, tops, sums_of<T>(row));
  }
  if (columns) {
    for (long r = 0; r < count; ++r) {
      for (int v = 0; v < kTileVectors; ++v) sums[v] += power(score(r, v), base(best[v]));
    }
    for (int v = 0; v < kTileVectors; ++v) {
      columns->template add<kDegree>(column + v * kRows, best[v], sums[v]);
    }
  }
  for (long c = 0; c < cols; ++c) {
    lowest = std::min(lowest, best[c / kRows][c % kRows]);
  }
  return highest - lowest <= -std::log2(kFaint<T>);
}

// One strip of scores, at most kBlock x kTileCols, reduced to sums over its rows and its columns.
template <class P, int kDegree>
class Strip {
 public:
  using T = typename P::Scalar;
  static constexpr long kRows = kWidth<T>, kCols = kTileCols<T>;

  // Sums of 2^(score - top), each tile reduced in the registers it was summed in. `top` is the
  // largest score of the first tile seen, a guess at that of the strip. False if the guess was so
  // far off that sums may have lost terms.
  bool sum(const Scores<P>& scores, const LeftOut<T>& left_out, T factor, long i, long count,
           long j) {
    const bool some = left_out.meets(i, count, j);
    std::fill_n(columns_, kTileVectors, Vec<T>{});
    // rows behind the last are no scores: they are left out here, before `top` sees them
    const auto first = [&](long r, Sums<T>& s) __attribute__((always_inline)) {
      scale(s, factor);
      if (some || count % kTileRows) left_out.put(-kInf<T>, s, i + r, count - r, j);
      Vec<T> best = s[0][0];
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) best = larger<T>(s[r][v], best);
      }
      top_ = largest_lane<T>(best);
      add(r, s, 1);
      return std::isfinite(top_);
    };
    const auto rest = [&](long r, Sums<T>& s) __attribute__((always_inline)) {
      if (some) {
        scale(s, factor);
        left_out.put(-kInf<T>, s, i + r, kTileRows, j);
      }
      add(r, s, some ? 1 : factor);
    };
    return scores.tiles(i, count, j, first, rest) &&
           sure(count, std::min(kCols, scores.columns - j));
  }

  void merge(LogSums<T>& rows, long i, long count, LogSums<T>* columns, long j) const {
    for (long r = 0; r < count; r += kRows) {
      rows.template add<kDegree>(i + r, broadcast(top_), load<T>(sums_ + r));
    }
    for (int v = 0; columns && v < kTileVectors; ++v) {
      columns->template add<kDegree>(j + v * kRows, broadcast(top_), columns_[v]);
    }
  }

  // The same, stored, with a maximum for every row and every column. True if one would have done.
  bool merge_exactly(const Scores<P>& scores, const LeftOut<T>& left_out, T factor,
                     LogSums<T>& rows, long i, long count, LogSums<T>* columns, long column,
                     long j) {
    const long whole = round_up(count, kRows);
    scores.strip(i, count, j, {scores_, kCols});
    for (T* s = scores_; s < scores_ + count * kCols; ++s) *s *= factor;
    if (left_out.meets(i, count, j)) left_out.put(-kInf<T>, {scores_, kCols}, i, count, j);
    std::fill(scores_ + count * kCols, scores_ + whole * kCols, -kInf<T>);

    return add_exactly<kDegree>(scores_, count, std::min(kCols, scores.columns - j), rows, i,
                                columns, column);
  }

 private:
  [[gnu::always_inline]] static void scale(Sums<T>& s, T factor) {
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) s[r][v] *= factor;
    }
  }

  [[gnu::always_inline]] void add(long at, const Sums<T>& s, T factor) {
    const Vec<T> f = broadcast(factor), top = broadcast(top_);
    Vec<T> column[kTileVectors] = {};
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      Vec<T> row = {};
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const Vec<T> e = exp2<kDegree, T>(s[r][v] * f - top);
        row += e;
        column[v] += e;
      }
      rows_[at + r] = row;
    }
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) columns_[v] += column[v];
  }

  // Finishes the sums over rows. Whether all sums are in the range where nothing was lost.
  bool sure(long count, long columns) {
    const auto good = [](Vec<T> x) {
      return (x >= broadcast(kFaint<T>)) & (x <= broadcast(kLoud<T>));
    };
    Ints<T> all_good = Ints<T>{} - 1;
    for (long r = 0; r < count; r += kRows) {
      // lanes behind the last add up to 1
      for (long l = count; l < r + kRows; ++l) rows_[l] = broadcast(T{1} / kRows);
      const Vec<T> sums = sums_of<T>(rows_ + r);
      store(sums_ + r, sums);
      all_good &= good(sums);
    }
    for (int v = 0; v < kTileVectors; ++v) {
      Vec<T> sums = columns_[v];
      for (long l = std::max<long>(0, columns - v * kRows); l < kRows; ++l) sums[l] = 1;
      all_good &= good(sums);
    }
    return all<T>(all_good);
  }

  T top_;
  Vec<T> columns_[kTileVectors], rows_[kBlock + kRows + kTileRows];  // added up lane by lane
  T sums_[kBlock + kRows], scores_[(kBlock + kRows) * kCols];
};

}  // namespace mmfast::MMFAST_LEVEL

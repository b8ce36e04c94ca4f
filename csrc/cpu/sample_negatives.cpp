// sample_negatives: for each row of S = scale * q kT the column of its largest S[i, j] + G[i, j],
// where G is Gumbel noise; P(j) is then proportional to exp S[i, j]. Logarithms are taken only
// where a bound of the noise, made of a word's bits, says that the pair may be the row's best yet:
// a dozen times a row.
#include <limits>

#include "noise.h"
#include "sweep.h"

namespace mmfast::MMFAST_LEVEL {
namespace {

// rows in hand at once: a counter's four words lie along a row of them, or down a column
constexpr long kRows = 4;

// The best of each row of S so far.
template <class T>
struct Draws {
  Buffer<double> value;    // score + noise
  Buffer<int64_t> column;  // -1: none yet
  Buffer<T> least;         // what score + bound must reach to matter

  explicit Draws(long n) : value(n), column(n), least(n) {
    std::fill_n(static_cast<double*>(value), n, -kInf);
    std::fill_n(static_cast<int64_t*>(column), n, -1);
    // -inf does not reach it
    std::fill_n(static_cast<T*>(least), n, std::numeric_limits<T>::lowest());
  }

  // Equal values: the lowest column, whatever came first. NaN and -inf are never taken.
  void offer(long i, double x, int64_t j) {
    if (!(x > value[i] || (x == value[i] && j < column[i]))) return;
    value[i] = x;
    column[i] = j;
    // more than bound and score are rounded by
    least[i] = T(x < kInf ? x - 0x1p-20 * (std::abs(x) + 64) : x);
  }

 private:
  static constexpr double kInf = std::numeric_limits<double>::infinity();
};

// kTurned: rows of the sweep are columns of S.
template <class P, bool kTurned>
class Strip {
 public:
  using T = typename P::Scalar;
  static constexpr long kCols = kTileCols<T>;

  // Rows and columns of the sweep; `shift` is what the draws of its columns have before j.
  void draw(const Scores<P>& scores, const LeftOut<T>& left_out, T scale, uint64_t key, long i,
            long count, long j, Draws<T>& draws, long shift) {
    scores.strip(i, count, j, {scores_, kCols});
    // NaN is never drawn, and stays one under a scale of any sign
    constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
    if (left_out.meets(i, count, j)) left_out.put(kNan, {scores_, kCols}, i, count, j);
    for (long r = 0; r < count; r += kRows) {
      fill(key, i + r, j);
      for (long u = 0; u < std::min(kRows, count - r); ++u) {
        row(scores_ + (r + u) * kCols, u * kCols, scale, i + r + u, j, draws, shift);
      }
    }
  }

 private:
  // Words, and bounds of their noise, of kRows rows from i on. A counter is (column / 4, row) of S.
  void fill(uint64_t key, uint64_t i, uint64_t j) {
    constexpr uint64_t kQuads = kCols / 4;
    Words place, zero = {};
    for (int l = 0; l < kWidth<double>; ++l) place[l] = l;
    for (long t = 0; t < kCols; t += kWidth<double>, place += kWidth<double>) {
      if (kTurned) {
        const Quad counters = {zero + i / 4, place + j, zero, zero};
        store_down(philox(counters, key), words_ + t, kCols);
      } else {
        const Quad counters = {place % kQuads + j / 4, place / kQuads + i, zero, zero};
        store_across(philox(counters, key), words_ + 4 * t);
      }
    }
    for (long t = 0; t < kRows * kCols; ++t) bounds_[t] = gumbel_bound(words_[t]);
  }

  void row(const T* s, long at, T scale, long i, long j, Draws<T>& draws, long shift) const {
    const T* const least = draws.least + (kTurned ? shift + j : i);
    const auto limit = [&](long c) { return kTurned ? load<T>(least + c) : broadcast(*least); };
    Ints<T> none = Ints<T>{} - 1;
    for (long c = 0; c < kCols; c += kWidth<T>) {
      none &= ~(load<T>(s + c) * scale + load<T>(bounds_ + at + c) >= limit(c));
    }
    if (all<T>(none)) return;
    for (long c = 0; c < kCols; ++c) {
      const T score = s[c] * scale;
      if (!(score + bounds_[at + c] >= least[kTurned ? c : 0])) continue;
      const long own = kTurned ? shift + j + c : i, other = kTurned ? i : j + c;
      draws.offer(own, score + gumbel(words_[at + c]), other);
    }
  }

  T scores_[kBlock * kCols], bounds_[kRows * kCols];
  uint32_t words_[kRows * kCols];
  static_assert(kBlock % P::kRows == 0 && kBlock % kRows == 0);
};

template <class P, bool kTurned>
void sample(const Pairs& pairs, uint64_t key, const View& indices, const Run& run) {
  using T = typename P::Scalar;
  constexpr long kCols = kTileCols<T>;
  const Cut lanes(pairs.q.rows), groups(pairs.k.rows);
  const Grid grid{lanes.count, groups.count};
  const Scores<P> scores(pairs.q, pairs.k, false, run);
  const LeftOut<T> left_out(pairs);
  // columns of the sweep are met by a lane of every team at once
  const long padded = round_up(pairs.k.rows, kCols), copies = kTurned ? grid.teams() : 1;
  Draws<T> draws(kTurned ? copies * padded : pairs.q.rows);
  Buffer<Strip<P, kTurned>> strips(run.threads);
  sweep(grid, run, [&](long lane, long group, int thread) {
    const TileRegisters<P> held;
    const long shift = lane / grid.groups * padded;
    for (long i = lanes.begin(lane); i < lanes.end(lane); i += kBlock) {
      const long count = std::min(kBlock, lanes.end(lane) - i);
      for (long j = groups.begin(group); j < groups.end(group); j += kCols) {
        strips[thread].draw(scores, left_out, T(pairs.scale), key, i, count, j, draws, shift);
      }
    }
  });
  for (long i = 0; i < indices.rows; ++i) {
    for (long c = 1; c < copies; ++c) {
      draws.offer(i, draws.value[i + c * padded], draws.column[i + c * padded]);
    }
    indices.at<int64_t>(i) = draws.column[i];
  }
}

}  // namespace

void sample_negatives(const Pairs& pairs, uint64_t seed, View indices, const Run& run) {
  with_arithmetic(pairs.q.type, [&](auto arithmetic) {
    using P = decltype(arithmetic);
    // lanes lie along the longer side
    if (pairs.q.rows < pairs.k.rows) {
      const Pairs& p = pairs;
      sample<P, true>({p.k, p.q, p.scale, p.k_ids, p.q_ids, p.mask ? p.mask.transposed() : p.mask},
                      seed, indices, run);
    } else {
      sample<P, false>(pairs, seed, indices, run);
    }
  });
}

}  // namespace mmfast::MMFAST_LEVEL

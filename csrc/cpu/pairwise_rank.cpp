// pairwise_rank: for each row of S = q kT its largest score, where it stands, and how many exceed
// a threshold of the row. A tile of scores is looked at in the registers it was summed in, or, on a
// matrix unit, from the cache; single scores only where a row may have a new best: a few times a
// row.
#include "sweep.h"

namespace mmfast::MMFAST_LEVEL {
namespace {

// What is known of each row of S so far.
template <class T>
struct Ranks {
  Buffer<T> largest;
  Buffer<int64_t> index, above;

  explicit Ranks(long n) : largest(n), index(n), above(n) {
    std::fill_n(static_cast<T*>(largest), n, -kInf<T>);
    std::fill_n(static_cast<int64_t*>(index), n, -1);
    std::fill_n(static_cast<int64_t*>(above), n, 0);
  }

  // Equal scores: the lowest column, whatever came first. NaN and -inf are never taken.
  void offer(long i, T score, int64_t j) {
    if (!(score > largest[i] || (score == largest[i] && j < index[i]))) return;
    largest[i] = score;
    index[i] = j;
  }

  // The scores of row i at the columns from j on.
  [[gnu::always_inline]] void add(long i, long j, const Vec<T>* s) {
    // equal ones matter where they come before
    const Vec<T> best = broadcast(largest[i]);
    Ints<T> better = {};
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      better |= j < index[i] ? s[v] >= best : s[v] > best;
    }
    if (!any<T>(better)) return;
    constexpr long kCols = kTileCols<T>;
    alignas(kVectorBytes) T scores[kCols];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) store(scores + v * kWidth<T>, s[v]);
    for (long c = 0; c < kCols; ++c) offer(i, scores[c], j + c);
  }

  [[gnu::always_inline]] void count(long i, T threshold, const Vec<T>* s) {
    int count = 0;
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) count += count_of<T>(s[v] > threshold);
    above[i] += count;
  }
};

template <class P>
void rank(const Pairs& pairs, const View& threshold, const View& largest, const View& index,
          const View& above, const Run& run) {
  using T = typename P::Scalar;
  constexpr long kCols = kTileCols<T>;
  const long N = pairs.q.rows;
  // lanes lie along the longer side; rows that lie across are met by a lane of every team at once
  const bool across = turned(pairs);
  const Cut rows(N), columns(pairs.k.rows);
  const Grid grid = across ? Grid{columns.count, rows.count} : Grid{rows.count, columns.count};
  const long copies = across ? grid.teams() : 1;
  const Scores<P> scores(pairs.q, pairs.k, false, run);
  const LeftOut<T> left_out(pairs);
  Buffer<T> limits(N);
  for (long i = 0; threshold && i < N; ++i) limits[i] = threshold.at<T>(i);
  std::vector<Ranks<T>> ranks;
  for (long c = 0; c < copies; ++c) ranks.emplace_back(N);
  sweep(grid, run, [&](long lane, long group, int) {
    const TileRegisters<P> held;
    Ranks<T>& mine = ranks[across ? lane / grid.groups : 0];
    const auto [row, column] = across ? std::pair{group, lane} : std::pair{lane, group};
    for (long i = rows.begin(row); i < rows.end(row); i += kBlock) {
      const long count = std::min(kBlock, rows.end(row) - i);
      for (long j = columns.begin(column); j < columns.end(column); j += kCols) {
        const bool some = left_out.meets(i, count, j);
        const auto each = [&](long r, Sums<T>& s) __attribute__((always_inline)) {
          const long here = std::min<long>(kTileRows, count - r);
          // NaN is never the largest and exceeds nothing
          if (some) left_out.put(std::numeric_limits<T>::quiet_NaN(), s, i + r, here, j);
#pragma GCC unroll 8
          for (int u = 0; u < kTileRows; ++u) {
            if (u >= here) break;
            mine.add(i + r + u, j, s[u]);
            if (threshold) mine.count(i + r + u, limits[i + r + u], s[u]);
          }
          return true;
        };
        scores.tiles(i, count, j, each, each);
      }
    }
  });
  for (long i = 0; i < N; ++i) {
    for (long c = 1; c < copies; ++c) {
      ranks[0].offer(i, ranks[c].largest[i], ranks[c].index[i]);
      ranks[0].above[i] += ranks[c].above[i];
    }
    largest.at<T>(i) = ranks[0].largest[i];
    index.at<int64_t>(i) = ranks[0].index[i];
    above.at<int64_t>(i) = ranks[0].above[i];
  }
}

}  // namespace

void pairwise_rank(const Pairs& pairs, View threshold, View largest, View index, View above,
                   const Run& run) {
  with_arithmetic(pairs.q.type, [&](auto arithmetic) {
    rank<decltype(arithmetic)>(pairs, threshold, largest, index, above, run);
  });
}

}  // namespace mmfast::MMFAST_LEVEL

// pairwise_stats: counts, extremes with their places, power sums and a histogram of all products
// <x_i, y_j>, or of those with i < j of one set, where tiles below the diagonal are not made.
//   products in the type of the scores; power sums of a visit in double, visits added in one order;
//   counts exact
// A tile of products is stored where the first cache holds it, and read twice: for sums and
// extremes, and for the histogram.
#include <limits>

#include "sweep.h"

namespace mmfast::MMFAST_LEVEL {
namespace {

// Half a vector of floats becomes a vector of doubles; a vector of doubles is one.
inline Vec<double> in_double(const double* x) { return load<double>(x); }
inline Vec<double> in_double(const float* x) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_cvtps_pd(_mm256_loadu_ps(x));
#else
  typedef float Half __attribute__((vector_size(kVectorBytes / 2), aligned(4), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Half*>(x), Vec<double>);
#endif
}

// The products of a tile, row by row; NaN in the place of one that is left out.
template <class T>
struct Tile {
  static constexpr long kCols = kTileCols<T>, kSize = kTileRows * kCols;
  alignas(kVectorBytes) T at[kSize];

  [[gnu::always_inline]] void put(const Sums<T>& s) {
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) store(at + r * kCols + v * kWidth<T>, s[r][v]);
    }
  }
  // Of each row r, those outside of the columns [first(r), end).
  template <class First>
  void leave_out(long rows, First first, long end) {
    for (long r = 0; r < kTileRows; ++r) {
      for (long c = 0; c < kCols; ++c) {
        if (r >= rows || c < first(r) || c >= end) at[r * kCols + c] = kNan;
      }
    }
  }
  static constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
};

// What is said of the products of one visit.
template <class T>
struct Visit {
  Vec<double> powers[4] = {};  // added up lane by lane
  int64_t count = 0;
  Extreme least{kInf<double>, -1, -1}, largest{-kInf<double>, -1, -1};

  void add(const Tile<T>& tile, bool some, double pivot, long i, long j) {
    if (some || !sums<false>(tile, pivot)) sums<true>(tile, pivot);
    Vec<T> low = broadcast(kInf<T>), high = -low;
    for (long c = 0; c < Tile<T>::kSize; c += kWidth<T>) {
      low = smaller<T>(load<T>(tile.at + c), low);
      high = larger<T>(load<T>(tile.at + c), high);
    }
    // equal ones matter where this tile may have the earlier place
    const Extreme first{least.value, i, j}, last{largest.value, i, j};
    const Vec<T> least_yet = broadcast(T(least.value)), largest_yet = broadcast(T(largest.value));
    if (any<T>(before(first, least, 1) ? low <= least_yet : low < least_yet)) {
      offer(tile, least, 1, i, j);
    }
    if (any<T>(before(last, largest, -1) ? high >= largest_yet : high > largest_yet)) {
      offer(tile, largest, -1, i, j);
    }
  }

  // Whether `a` is the more extreme: the lowest row and then the lowest column of equal ones.
  static bool before(const Extreme& a, const Extreme& b, double sign) {
    if (a.row < 0 || !(sign * a.value <= sign * b.value)) return false;
    if (b.row < 0 || a.value != b.value) return true;
    return a.row != b.row ? a.row < b.row : a.column < b.column;
  }

 private:
  // False, and nothing added, if a product may be NaN; then kSome leaves those out.
  template <bool kSome>
  bool sums(const Tile<T>& tile, double pivot) {
    // two of each: an addition need not wait for the one before
    constexpr long kStep = kWidth<double>, kSize = Tile<T>::kSize;
    Vec<double> sums[4][2] = {};
    int64_t numbers = 0;
    for (long c = 0; c < kSize; c += 2 * kStep) {
#pragma GCC unroll 2
      for (int u = 0; u < 2; ++u) {
        const Vec<double> x = in_double(tile.at + c + u * kStep);
        Vec<double> d = x - pivot;
        if (kSome) {
          d = select<double>(x == x, d, Vec<double>{});
          numbers += count_of<double>(x == x);
        }
        const Vec<double> square = d * d;
        sums[0][u] += d;
        sums[1][u] += square;
        sums[2][u] += square * d;
        sums[3][u] += square * square;
      }
    }
    // squares are not NaN by infinities of both signs
    const Vec<double> squares = sums[1][0] + sums[1][1];
    if (!kSome && any<double>(squares != squares)) return false;
    for (int p = 0; p < 4; ++p) powers[p] += sums[p][0] + sums[p][1];
    count += kSome ? numbers : kSize;
    return true;
  }

  static void offer(const Tile<T>& tile, Extreme& best, double sign, long i, long j) {
    for (long r = 0; r < kTileRows; ++r) {
      for (long c = 0; c < Tile<T>::kCols; ++c) {
        const Extreme other{tile.at[r * Tile<T>::kCols + c], i + r, j + c};
        if (before(other, best, sign)) best = other;
      }
    }
  }
};

// A thread's own histogram. Slot 0 is below the edges, the last but one above, the last is for NaN.
// Neighbouring products count in tables of their own: increments of one place that follow each
// other would each wait for the one before.
template <class T>
class Histogram {
 public:
  static constexpr int kTables = std::min<int>(8, kTileCols<T>);

  explicit Histogram(const View& edges)
      : bins_(edges.rows - 1),
        slots_(bins_ + 3),
        edges_(bins_ + 1),
        counts_(kTables * slots_),
        totals_(slots_) {
    for (long b = 0; b <= bins_; ++b) edges_[b] = edges.at<double>(b);
    std::fill_n(static_cast<uint32_t*>(counts_), kTables * slots_, 0);
    std::fill_n(static_cast<int64_t*>(totals_), slots_, 0);
    const double low = edges_[0], high = edges_[bins_], by = bins_ / (high - low);
    norm_ = T(by);
    shift_ = T(1 - low * by);
    doubt_ = T((bins_ + std::max(std::abs(low), std::abs(high)) * by) * 4 *
               std::numeric_limits<T>::epsilon());
  }

  void add(const Tile<T>& tile) {
    constexpr long kCols = Tile<T>::kCols;
    Int slots[kCols];
    if (held_ > (uint32_t{1} << 31)) flush();
    held_ += Tile<T>::kSize;
    for (long r = 0; r < kTileRows; ++r) {
      const T* x = tile.at + r * kCols;
      if (!find(x, slots)) {
        for (long c = 0; c < kCols; ++c) slots[c] = slot_of(x[c]);
      }
      for (long c = 0; c < kCols; c += kTables) {
#pragma GCC unroll 8
        for (int t = 0; t < kTables; ++t) ++counts_[t * slots_ + slots[c + t]];
      }
    }
  }

  // Into counts [bins + 2].
  void finish(const View& counts) {
    flush();
    for (long b = 0; b < bins_ + 2; ++b) counts.at<int64_t>(b) += totals_[b];
  }

 private:
  using Int = typename Simd<T>::Int;

  // Slots of a row by one multiplication. False if one is so near an edge that rounding may have
  // moved it across.
  bool find(const T* x, Int* slots) const {
    // adding 1.5 * 2^23 rounds to an integer
    constexpr T kMagic = sizeof(T) == 8 ? 6755399441055744.0 : 12582912.0;
    Ints<T> doubtful = {};
    for (long c = 0; c < Tile<T>::kCols; c += kWidth<T>) {
      const Vec<T> value = load<T>(x + c);
      Vec<T> at = larger<T>(value * norm_ + shift_, broadcast(T(0.5)));
      at = smaller<T>(at, broadcast(bins_ + T(1.5)));
      at = select<T>(value == value, at, broadcast(bins_ + T(2.5)));
      const Vec<T> off = at - ((at + kMagic) - kMagic);
      doubtful |= larger<T>(off, -off) <= doubt_;
      *reinterpret_cast<typename Simd<T>::LooseInts*>(slots + c) =
          __builtin_convertvector(at, Ints<T>);
    }
    return !any<T>(doubtful);
  }

  // By the edges themselves, as numpy.histogram has it: from a guess that is off by at most one.
  long slot_of(T value) const {
    const double x = value;
    if (x != x) return bins_ + 2;
    if (x < edges_[0]) return 0;
    if (!(x < edges_[bins_])) return x > edges_[bins_] ? bins_ + 1 : bins_;
    long b = std::min(std::max<long>(long(T(x) * norm_ + shift_), 1), bins_);
    b += x >= edges_[b];
    b -= x < edges_[b - 1];
    return b;
  }

  void flush() {
    for (long t = 0; t < kTables * slots_; ++t) totals_[t % slots_] += std::exchange(counts_[t], 0);
    held_ = 0;
  }

  long bins_, slots_;
  Buffer<double> edges_;
  Buffer<uint32_t> counts_;
  Buffer<int64_t> totals_;
  uint64_t held_ = 0;
  T norm_, shift_, doubt_;
};

template <class P>
PairStats stats(const View& x, const View& y, bool distinct, const View& edges, double pivot,
                const View& counts, const Run& run) {
  using T = typename P::Scalar;
  constexpr long kCols = kTileCols<T>;
  const Cut lanes(x.rows), groups(y.rows);
  const Scores<P> scores(x, y, false, run);
  // two blocks of rows while a panel of y is near
  const long height = std::max(lanes.width, 2 * kBlock);
  std::vector<std::pair<long, long>> order;
  for (long begin = 0; begin < x.rows; begin += height) {
    for (long group = 0; group < groups.count; ++group) {
      if (!distinct || groups.end(group) > begin + 1) order.emplace_back(begin, group);
    }
  }
  std::vector<Visit<T>> visits(order.size());
  std::vector<Histogram<T>> histograms;
  for (int t = 0; edges && t < run.threads; ++t) histograms.emplace_back(edges);
  for_each(order.size(), run, [&](long turn, int thread) {
    const TileRegisters<P> held;
    const auto [begin, group] = order[turn];
    Visit<T> visit;
    Tile<T> tile;
    for (long j = groups.begin(group); j < groups.end(group); j += kCols) {
      // rows from the last column on have no pair in this strip
      const long last = distinct ? j + kCols - 1 : x.rows, width = y.rows - j;
      const long end = std::min({begin + height, x.rows, last});
      for (long i = begin; i < end; i += kBlock) {
        const long count = std::min(kBlock, end - i);
        const auto each = [&](long r, Sums<T>& s) __attribute__((always_inline)) {
          tile.put(s);
          const long rows = count - r, diagonal = distinct ? i + r + 1 - j : -kTileRows;
          const bool some = rows < kTileRows || width < kCols || diagonal + kTileRows > 1;
          if (some) tile.leave_out(rows, [&](long u) { return diagonal + u; }, width);
          visit.add(tile, some, pivot, i + r, j);
          if (edges) histograms[thread].add(tile);
          return true;
        };
        scores.tiles(i, count, j, each, each);
      }
    }
    visits[turn] = visit;
  });
  PairStats all{{}, {kInf<double>, -1, -1}, {-kInf<double>, -1, -1}};
  int64_t count = 0;
  for (const Visit<T>& visit : visits) {
    for (int p = 0; p < 4; ++p) all.powers[p] += sum_of_lanes<double>(visit.powers[p]);
    count += visit.count;
    if (Visit<T>::before(visit.least, all.least, 1)) all.least = visit.least;
    if (Visit<T>::before(visit.largest, all.largest, -1)) all.largest = visit.largest;
  }
  for (long b = 0; b < counts.rows; ++b) counts.at<int64_t>(b) = edges ? 0 : count;
  for (Histogram<T>& histogram : histograms) histogram.finish(counts);
  return all;
}

}  // namespace

PairStats pairwise_stats(View x, View y, View edges, double pivot, View counts, const Run& run) {
  return with_arithmetic(x.type, [&](auto arithmetic) {
    return stats<decltype(arithmetic)>(x, y ? y : x, !y, edges, pivot, counts, run);
  });
}

}  // namespace mmfast::MMFAST_LEVEL

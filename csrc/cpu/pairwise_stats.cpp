// pairwise_stats: counts, extremes with their places, power sums and a histogram of all products
// <x_i, y_j>, or of those with i < j of one set, where tiles below the diagonal are not made.
//   products in the type of the scores; power sums of a visit in double, visits added in one order;
//   counts exact
// A tile of products is stored where the first cache holds it, and read for sums, for extremes and
// for the histogram.
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

// The products of as many rows as the arithmetic takes at a time; NaN in the place of one that is
// left out.
template <class P>
struct Tile {
  using T = typename P::Scalar;
  static constexpr long kRows = P::kRows, kCols = kTileCols<T>, kSize = kRows * kCols;
  alignas(kVectorBytes) T at[kSize];

  // Of each row r, those outside of the columns [first(r), end).
  template <class First>
  void leave_out(long rows, First first, long end) {
    for (long r = 0; r < kRows; ++r) {
      for (long c = 0; c < kCols; ++c) {
        if (r >= rows || c < first(r) || c >= end) at[r * kCols + c] = kNan;
      }
    }
  }
  static constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
};

// What is said of the products of one visit.
template <class P>
struct Visit {
  using T = typename P::Scalar;

  Vec<double> powers[4] = {};  // added up lane by lane
  int64_t count = 0;
  Extreme least{kInf<double>, -1, -1}, largest{-kInf<double>, -1, -1};

  void add(const Tile<P>& tile, bool some, double pivot, long i, long j) {
    Vec<T> low = broadcast(kInf<T>), high = -low;
    if (some || !sums<false>(tile, pivot, low, high)) sums<true>(tile, pivot, low, high);
    // equal ones matter where this tile may have the earlier place
    const Extreme first{least.value, i, j}, last{largest.value, i, j};
    const Vec<T> least_yet = broadcast(T(least.value)), largest_yet = broadcast(T(largest.value));
    if (any<T>(before(first, least, 1) ? low <= least_yet : low < least_yet)) {
      offer(tile, -largest_lane<T>(-low), least, 1, i, j);
    }
    if (any<T>(before(last, largest, -1) ? high >= largest_yet : high > largest_yet)) {
      offer(tile, largest_lane<T>(high), largest, -1, i, j);
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
  bool sums(const Tile<P>& tile, double pivot, Vec<T>& low, Vec<T>& high) {
    // two of each: an addition need not wait for the one before
    constexpr long kStep = kWidth<double>, kSize = Tile<P>::kSize;
    Vec<double> sums[4][2] = {};
    int64_t numbers = 0;
    for (long c = 0; c < kSize; c += 2 * kStep) {
      for (long v = c; v < c + 2 * kStep; v += kWidth<T>) {
        low = smaller<T>(load<T>(tile.at + v), low);
        high = larger<T>(load<T>(tile.at + v), high);
      }
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

  // The first product of the tile that is `value`, the most extreme of them.
  static void offer(const Tile<P>& tile, T value, Extreme& best, double sign, long i, long j) {
    for (long c = 0; c < Tile<P>::kSize; c += kWidth<T>) {
      if (const unsigned here = bits_of<T>(load<T>(tile.at + c) == value)) {
        const long at = c + __builtin_ctz(here);
        const Extreme found{value, i + at / Tile<P>::kCols, j + at % Tile<P>::kCols};
        if (before(found, best, sign)) best = found;
        return;
      }
    }
  }
};

// A thread's own histogram. Slot 0 is below the edges; the last one is above, and takes NaN, too.
// Neighbouring products count in tables of their own: increments of one place that follow each
// other would each wait for the one before. No two threads write one line.
template <class P>
class alignas(64) Histogram {
 public:
  using T = typename P::Scalar;
  static constexpr long kCols = Tile<P>::kCols;
  static constexpr int kTables = std::min<int>(8, kCols);

  explicit Histogram(const View& edges)
      : bins_(edges.rows - 1),
        slots_(bins_ + 2),
        edges_(bins_ + 1),
        counts_(kTables * slots_),
        totals_(slots_) {
    for (long b = 0; b <= bins_; ++b) edges_[b] = edges.at<double>(b);
    std::fill_n(static_cast<uint32_t*>(counts_), kTables * slots_, 0);
    std::fill_n(static_cast<int64_t*>(totals_), slots_, 0);
    const double low = edges_[0], high = edges_[bins_], by = bins_ / (high - low);
    const double doubt = (bins_ + std::max(std::abs(low), std::abs(high)) * by) * 4 *
                         std::numeric_limits<T>::epsilon();
    norm_ = T(by);
    shift_ = T(1 - low * by + doubt);
    doubt_ = T(2 * doubt);
  }

  void add(const Tile<P>& tile) {
    if (held_ > (uint32_t{1} << 31)) flush();
    held_ += Tile<P>::kSize;
    Int slots[kCols];
    for (const T* x = tile.at; x < tile.at + Tile<P>::kSize; x += kCols) {
      for (uint64_t doubtful = find(x, slots); doubtful != 0; doubtful &= doubtful - 1) {
        const int c = __builtin_ctzll(doubtful);
        slots[c] = slot_of(x[c]);
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
    for (long b = 0; b < slots_; ++b) counts.at<int64_t>(b) += totals_[b];
  }

 private:
  using Int = typename Simd<T>::Int;

  // Slots of a row by one multiplication. A bit for each that is so near an edge that rounding may
  // have moved it across.
  uint64_t find(const T* x, Int* slots) const {
    uint64_t doubtful = 0;
    for (long c = 0; c < kCols; c += kWidth<T>) {
      Vec<T> at = smaller<T>(load<T>(x + c) * norm_ + shift_, broadcast(bins_ + T(1.5)));
      at = larger<T>(at, broadcast(T(0.5)));
      const Ints<T> slot = __builtin_convertvector(at, Ints<T>);
      const Vec<T> off = at - __builtin_convertvector(slot, Vec<T>);
      doubtful |= uint64_t{bits_of<T>(off < doubt_)} << c;
      *reinterpret_cast<typename Simd<T>::LooseInts*>(slots + c) = slot;
    }
    return doubtful;
  }

  // By the edges themselves, as numpy.histogram has it: from a guess that is off by at most one.
  long slot_of(T value) const {
    const double x = value;
    if (x < edges_[0]) return 0;
    if (!(x < edges_[bins_])) return x == edges_[bins_] ? bins_ : bins_ + 1;
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

// A side of this many rows or fewer is packed at once. Of more, a block of them for each block of
// the other side: memory does not grow with them, and each is read once for so many pairs that it
// costs little.
constexpr long kPacked = 64 * kBlock;

template <class P>
class Statistics {
 public:
  Statistics(const View& edges, double pivot, const Run& run) : pivot_(pivot), run_(run) {
    for (int t = 0; edges && t < run.threads; ++t) histograms_.emplace_back(edges);
  }

  // All pairs of x and y, or those with i < j of one set.
  void add(const View& x, const View& y, bool distinct) {
    for (long i = 0; i < x.rows; i += kPacked) {
      for (long j = distinct ? i : 0; j < y.rows; j += kPacked) {
        add_block(x.some_rows(i, kPacked), y.some_rows(j, kPacked), distinct && i == j, i, j);
      }
    }
  }

  // Writes counts, returns the rest.
  PairStats finish(const View& counts) {
    for (long b = 0; b < counts.rows; ++b) {
      counts.at<int64_t>(b) = histograms_.empty() ? count_ : 0;
    }
    for (Histogram<P>& histogram : histograms_) histogram.finish(counts);
    // what the last slot took that is no number
    int64_t others = -count_;
    for (long b = 0; b < counts.rows; ++b) others += counts.at<int64_t>(b);
    counts.at<int64_t>(counts.rows - 1) -= others;
    return all_;
  }

 private:
  static constexpr long kRows = Tile<P>::kRows, kCols = Tile<P>::kCols;
  // rows that stay in the second cache while panels of y pass by
  static constexpr long kNear = 2 * kBlock * P::kPack;

  // Rows of x and y that stand `row` and `column` further down in the whole.
  void add_block(const View& x, const View& y, bool distinct, long row, long column) {
    const Cut groups(y.rows);
    const Scores<P> scores(x, y, false, run_);
    std::vector<std::pair<long, long>> order;
    for (long top = 0; top < x.rows; top += kNear) {
      for (long group = 0; group < groups.count; ++group) {
        if (!distinct || groups.end(group) > top + 1) order.emplace_back(top, group);
      }
    }
    std::vector<Visit<P>> visits(order.size());
    for_each(order.size(), run_, [&](long turn, int thread) {
      const TileRegisters<P> held;
      const auto [top, group] = order[turn];
      Visit<P> visit;
      Tile<P> tile;
      for (long j = groups.begin(group); j < groups.end(group); j += kCols) {
        // rows from the last column on have no pair in this strip
        const long last = distinct ? j + kCols - 1 : x.rows, width = y.rows - j;
        const long end = std::min({top + kNear, x.rows, last});
        for (long i = top; i < end; i += kRows) {
          scores.expect(j + kCols, i - top, kRows, end - top);
          scores.strip(i, kRows, j, {tile.at, kCols});
          const long rows = end - i, diagonal = distinct ? i + 1 - j : -kRows;
          const bool some = rows < kRows || width < kCols || diagonal + kRows > 1;
          if (some) tile.leave_out(rows, [&](long r) { return diagonal + r; }, width);
          visit.add(tile, some, pivot_, row + i, column + j);
          if (!histograms_.empty()) histograms_[thread].add(tile);
        }
      }
      visits[turn] = visit;
    });
    for (const Visit<P>& visit : visits) {
      for (int p = 0; p < 4; ++p) all_.powers[p] += sum_of_lanes<double>(visit.powers[p]);
      count_ += visit.count;
      if (Visit<P>::before(visit.least, all_.least, 1)) all_.least = visit.least;
      if (Visit<P>::before(visit.largest, all_.largest, -1)) all_.largest = visit.largest;
    }
  }

  double pivot_;
  const Run& run_;
  std::vector<Histogram<P>> histograms_;
  PairStats all_{{}, {kInf<double>, -1, -1}, {-kInf<double>, -1, -1}};
  int64_t count_ = 0;
};

}  // namespace

PairStats pairwise_stats(View x, View y, View edges, double pivot, View counts, const Run& run) {
  return with_arithmetic(x.type, [&](auto arithmetic) {
    Statistics<decltype(arithmetic)> statistics(edges, pivot, run);
    statistics.add(x, y ? y : x, !y);
    return statistics.finish(counts);
  });
}

}  // namespace mmfast::MMFAST_LEVEL

#pragma once
#include <algorithm>
#include <vector>

#include "amx.h"
#include "parallel.h"
#include "vmath.h"

// The tile loop: who visits which rows and columns of S, what a visit multiplies, which pairs it
// leaves out. What happens to the scores is the op's own epilogue (<stem>.cpp).
namespace mmfast::MMFAST_LEVEL {

// One side of S in lanes or groups: at most 64, at least 64 wide, by the shape alone. Eight are
// enough to keep threads busy while short, and wider ones make deeper products.
struct Cut {
  long size, width, count;
  explicit Cut(long n) : size(n) {
    width = std::min(std::max<long>(round_up((n + 7) / 8, 64), 64), kBlock);
    if (n > 64 * kBlock) width = round_up((n + 63) / 64, kBlock);
    count = (n + width - 1) / width;
  }
  Cut(long n, long wide) : size(n), width(wide), count((n + wide - 1) / wide) {}
  long begin(long i) const { return i * width; }
  long end(long i) const { return std::min(size, (i + 1) * width); }
};

// Lanes lie along the longer side.
inline bool turned(const Pairs& pairs) { return pairs.q.rows < pairs.k.rows; }
inline Pairs turn(const Pairs& p) {
  return {p.k, p.q, p.scale, p.k_ids, p.q_ids, p.mask ? p.mask.transposed() : p.mask};
}

// The pairs that stay. Ids become integers as wide as a score, once a call.
template <class T>
class LeftOut {
 public:
  using Int = typename Simd<T>::Int;

  LeftOut(const Pairs& pairs) : mask_(pairs.mask), columns_(pairs.k.rows) {
    if (!pairs.q_ids) return;
    const View sides[] = {pairs.q_ids, pairs.k_ids};
    int64_t lowest = pairs.q_ids.at<int64_t>(0), highest = lowest;
    for (const View& ids : sides) {
      for (long i = 0; i < ids.rows; ++i) {
        lowest = std::min(lowest, ids.at<int64_t>(i));
        highest = std::max(highest, ids.at<int64_t>(i));
      }
    }
    const uint64_t spread = uint64_t(highest) - uint64_t(lowest);
    std::vector<int64_t> known;  // ids too far apart for an Int are numbered in order instead
    if (spread > uint64_t(std::numeric_limits<Int>::max())) {
      for (const View& ids : sides) {
        for (long i = 0; i < ids.rows; ++i) known.push_back(ids.at<int64_t>(i));
      }
      std::sort(known.begin(), known.end());
    }
    for (int side = 0; side < 2; ++side) {
      const View& ids = sides[side];
      codes_[side] = Buffer<Int>(ids.rows + kTileCols<T>);
      for (long i = 0; i < ids.rows; ++i) {
        const int64_t id = ids.at<int64_t>(i);
        codes_[side][i] =
            known.empty() ? Int(uint64_t(id) - uint64_t(lowest))
                          : Int(std::lower_bound(known.begin(), known.end(), id) - known.begin());
      }
      std::fill_n(codes_[side] + ids.rows, kTileCols<T>, Int{-1});
    }
  }

  // Whether a strip of S, `rows` from i on and kTileCols from j on, has any.
  bool meets(long i, long rows, long j) const {
    if (mask_ || j + kTileCols<T> > columns_) return true;
    if (!codes_[0]) return false;
    const auto [low, high] = range(codes_[0] + i, rows);
    const auto [low_j, high_j] = range(codes_[1] + j, kTileCols<T>);
    return low <= high_j && low_j <= high;
  }

  // Writes `value` in their places; columns behind the last are left out too.
  void put(T value, Matrix<T> strip, long i, long rows, long j) const {
    const long cols = std::min<long>(kTileCols<T>, columns_ - j);
    for (long r = 0; r < rows; ++r) {
      T* s = strip.data + r * strip.stride;
      if (codes_[0]) {
        for (long c = 0; c < kTileCols<T>; c += kWidth<T>) {
          const Ints<T> ids =
              *reinterpret_cast<const typename Simd<T>::LooseInts*>(codes_[1] + j + c);
          store(s + c, select<T>(ids == codes_[0][i + r], broadcast(value), load<T>(s + c)));
        }
      }
      if (mask_) {
        for (long c = 0; c < cols; ++c) s[c] = mask_.at<bool>(i + r, j + c) ? s[c] : value;
      }
      for (long c = cols; c < kTileCols<T>; ++c) s[c] = value;
    }
  }

  // The same in a tile of `rows` rows; the rows behind them are left out too. Through memory: one
  // variable index would keep the tile there while it is summed.
  [[gnu::always_inline]] void put(T value, Sums<T>& s, long i, long rows, long j) const {
    alignas(kVectorBytes) T stored[kTileRows * kTileCols<T>];
    const auto each = [&](auto body) {
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) {
          body(s[r][v], stored + r * kTileCols<T> + v * kWidth<T>);
        }
      }
    };
    each([](Vec<T> x, T* to) { store(to, x); });
    put(value, Matrix<T>{stored, kTileCols<T>}, i, rows, j);
    std::fill(stored + rows * kTileCols<T>, stored + kTileRows * kTileCols<T>, value);
    each([](Vec<T>& x, const T* from) { x = load<T>(from); });
  }

 private:
  static std::pair<Int, Int> range(const Int* ids, long count) {
    Int low = ids[0], high = ids[0];
    for (long i = 1; i < count; ++i) {
      low = std::min(low, ids[i]);
      high = std::max(high, ids[i]);
    }
    return {low, high};
  }

  Buffer<Int> codes_[2];
  View mask_;
  long columns_;
};

// q as A, k as B of S = q kT, packed. `k_rows` keeps the rows of k as well, for a gradient.
template <class P>
struct Scores {
  using T = typename P::Scalar;
  using Unit = typename P::Unit;
  static constexpr long kCols = kTileCols<T>;

  Shape<P> shape;
  long columns;
  Buffer<Unit> rows, panels, k_rows;

  Scores(const View& q, const View& k, bool keep_k, const Run& run)
      : shape(q.cols),
        columns(k.rows),
        rows((q.rows + P::kRows) * shape.stride),
        panels(round_up(k.rows, kCols) * shape.depth) {
    if (keep_k) k_rows = Buffer<Unit>(k.rows * shape.stride);
    // one set: its rows are read once
    const bool one =
        !keep_k && q.data == k.data && q.rows == k.rows && q.row_stride == k.row_stride;
    for_each_chunk(q.rows, run, [&](long begin, long end, int) {
      for (long i = begin; i < end; ++i) pack_row<P>(q, i, shape, row(i));
      if (one) pack_panel<P>(row(begin), end - begin, shape, panel(begin));
    });
    Buffer<Unit> spare(one ? 0 : run.threads * kCols * shape.stride);
    for_each_chunk(one ? 0 : k.rows, run, [&](long begin, long end, int thread) {
      Unit* packed = keep_k ? k_rows + begin * shape.stride : spare + thread * kCols * shape.stride;
      for (long j = begin; j < end; ++j) {
        pack_row<P>(k, j, shape, packed + (j - begin) * shape.stride);
      }
      pack_panel<P>(packed, end - begin, shape, panel(begin));
    });
    std::memset(row(q.rows), 0, P::kRows * shape.stride * sizeof(Unit));
  }

  // work(begin, end, thread) for rows in chunks as high as a panel is wide
  template <class Work>
  static void for_each_chunk(long count, const Run& run, Work work) {
    for_each((count + kCols - 1) / kCols, run, [&](long chunk, int thread) {
      work(chunk * kCols, std::min(count, (chunk + 1) * kCols), thread);
    });
  }

  Unit* row(long i) const { return rows + i * shape.stride; }
  Unit* panel(long j) const { return panels + j * shape.depth; }

  // Asks for `part` of the `whole` of a panel, `done` of which was asked for: it is read once for
  // every tile of rows, but comes from far away.
  void expect(long j, long done, long part, long whole) const {
    if (j >= columns) return;
    const long size = kCols * shape.depth;
    for (long u = size * done / whole; u < std::min(size, size * (done + part) / whole);
         u += kWidth<T>) {
      __builtin_prefetch(panel(j) + u, 0, 2);
    }
  }

  // <q_i, k_j> for `count` rows from i on and kCols columns from j on, tile by tile in registers:
  // the last tile to first(r, sums), r the row it begins with, and if that says yes the others to
  // rest(r, sums).
  template <class First, class Rest>
  [[gnu::always_inline]] bool tiles(long i, long count, long j, First first, Rest rest) const {
    const long last = (count - 1) / kTileRows * kTileRows;
    if constexpr (kOnTiles<P>) {
      // made at once and read from the cache
      alignas(kVectorBytes) T stored[(kBlock + kTileRows) * kCols];
      strip(i, count, j, {stored, kCols});
      Sums<T> sums;
      const auto fetch = [&](long r) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int u = 0; u < kTileRows; ++u) {
#pragma GCC unroll 4
          for (int v = 0; v < kTileVectors; ++v) {
            sums[u][v] = load<T>(stored + (r + u) * kCols + v * kWidth<T>);
          }
        }
      };
      fetch(last);
      if (!first(last, sums)) return false;
      for (long r = 0; r < last; r += kTileRows) {
        fetch(r);
        rest(r, sums);
      }
    } else {
      const auto tile = [&](long r, auto use) __attribute__((always_inline)) {
        tile_sums<P, kTileVectors, Stride::rows, false>(shape.units, {row(i + r), shape.stride},
                                                        {panel(j), kCols}, {}, use);
      };
      bool good = true;
      tile(last, [&](Sums<T>& sums) __attribute__((always_inline)) { good = first(last, sums); });
      if (!good) return false;
      for (long r = 0; r < last; r += kTileRows) {
        tile(r, [&](Sums<T>& sums) __attribute__((always_inline)) { rest(r, sums); });
      }
    }
    return true;
  }

  // The same, written as whole tiles.
  void strip(long i, long count, long j, Matrix<T> s) const {
    MMFAST_LEVEL::strip<P>(count, shape.depth, {row(i), shape.stride}, panel(j), s);
  }
};

// The kernels' own arithmetic for an input type.
template <class Body>
auto with_arithmetic(Type type, Body body) {
  switch (type) {
    case Type::f64:
      return body(F64{});
#if defined(__AMX_BF16__)
    case Type::bf16:
      return body(AMX{});
#elif defined(__AVX512BF16__)
    case Type::bf16:
      return body(BF16{});
#endif
    default:
      return body(F32{});
  }
}

}  // namespace mmfast::MMFAST_LEVEL

#pragma once
#include <algorithm>
#include <type_traits>

#include "isa.h"

// The register tile and the product made of it.
//   f32  in -> f32 accumulate;  f64 in -> f64 accumulate;  bf16 in -> f32 accumulate (dpbf16; on a
//   matrix unit, where there is one: amx.h)
//   f16, and bf16 where there is no dpbf16, are widened to f32 on packing (pack.h)
// Operands are counted in units: what one lane of a vector holds of them. A bf16 unit is a pair of
// neighbours along the summed dimension. The arithmetic takes kDepth units and kRows rows at a
// time.
namespace mmfast::MMFAST_LEVEL {

struct F32 {
  using Scalar = float;
  using Unit = float;
  static constexpr int kPack = 1, kRows = kTileRows, kDepth = 1;
  static Vec<float> dot(Vec<float> c, float a, Vec<float> b) { return c + a * b; }
};

struct F64 {
  using Scalar = double;
  using Unit = double;
  static constexpr int kPack = 1, kRows = kTileRows, kDepth = 1;
  static Vec<double> dot(Vec<double> c, double a, Vec<double> b) { return c + a * b; }
};

#if defined(__AVX512BF16__)
struct BF16 {
  using Scalar = float;
  using Unit = uint32_t;
  static constexpr int kPack = 2, kRows = kTileRows, kDepth = 1;
  static Vec<float> dot(Vec<float> c, uint32_t a, Vec<float> b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
  }
};
#endif

// Where element (i, p) of A stands: `rows`: a[i * stride + p], `depth`: a[p * stride + i].
enum class Stride { rows, depth };

template <class T>
struct Matrix {
  T* data;
  long stride;
  Matrix at(long i, long j) const { return {data + i * stride + j, stride}; }
};

// Products on a matrix unit, whose registers a thread holds while this lives.
template <class P>
constexpr bool kOnTiles = P::kDepth > 1;
template <class P>
struct TileRegisters {
  TileRegisters() {}
};

// A panel of B is larger than the first cache; a core with two multiply-adds a cycle would wait for
// lines of it that are not asked for this many rows before (measured: 4 to 8 %).
constexpr long kAhead = 8;

// A tile of results while it is in registers.
template <class T, int kVectors = kTileVectors>
using Sums = Vec<T>[kTileRows][kVectors];

// A B of one tile, A [kTileRows, depth], B [depth, kVectors * width], given to use(sums). A needs
// no packing: its elements are broadcast one by one, so any stride that spares the cache sets will
// do. `fetched` is brought near meanwhile, if kFetch.
template <class P, int kVectors, Stride kStride, bool kFetch, class Use>
[[gnu::always_inline]] inline void tile_sums(long depth, Matrix<const typename P::Unit> a,
                                             Matrix<const typename P::Unit> b,
                                             Matrix<typename P::Scalar> fetched, Use use) {
  using T = typename P::Scalar;
  clear_vectors();
  Sums<T, kVectors> sum = {};
  // three rows a pointer: x86 addresses base + {0, 1, 2} * stride in one operand
  const typename P::Unit* base[(kTileRows + 2) / 3];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; i += 3) base[i / 3] = a.data + i * a.stride;
  // C comes from further away than A and B and is wanted only at the end: a row of it is asked for
  // now and then, not all at once, which would keep the loads of A and B waiting
  for (long p = 0, stage = 0; stage < (kFetch ? kTileRows : 1); ++stage) {
    if (kFetch) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        __builtin_prefetch(fetched.data + stage * fetched.stride + j * kWidth<T>, 1);
      }
    }
    for (const long until = kFetch ? depth * (stage + 1) / kTileRows : depth; p < until; ++p) {
      Vec<T> row[kVectors];
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        __builtin_prefetch(b.data + kAhead * b.stride + j * kWidth<T>);
        row[j] = load<T>(b.data + j * kWidth<T>);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; ++i) {
        const auto x = kStride == Stride::rows ? base[i / 3][(i % 3) * a.stride + p] : a.data[i];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) sum[i][j] = P::dot(sum[i][j], x, row[j]);
      }
      b.data += b.stride;
      if (kStride == Stride::depth) a.data += a.stride;
    }
  }
  use(sum);
}

// C (+)= A B for one tile.
template <class P, int kVectors, Stride kStride, bool kAdd>
inline void tile(long depth, Matrix<const typename P::Unit> a, Matrix<const typename P::Unit> b,
                 Matrix<typename P::Scalar> c) {
  using T = typename P::Scalar;
  tile_sums<P, kVectors, kStride, kAdd>(depth, a, b, c, [&](const Sums<T, kVectors>& sum) {
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        T* to = c.data + i * c.stride + j * kWidth<T>;
        store(to, kAdd ? load<T>(to) + sum[i][j] : sum[i][j]);
      }
    }
  });
}

// One panel of S, kTileCols wide, written as whole tiles.
template <class P>
void strip(long rows, long depth, Matrix<const typename P::Unit> a, const typename P::Unit* b,
           Matrix<typename P::Scalar> c) {
  if constexpr (kOnTiles<P>) {
    P::strip(rows, depth, a, b, c);
  } else {
    const Matrix<const typename P::Unit> panel{b, kTileCols<typename P::Scalar>};
    for (long i = 0; i < rows; i += kTileRows) {
      tile<P, kTileVectors, Stride::rows, false>(depth, a.at(i, 0), panel, c.at(i, 0));
    }
  }
}

// One panel of C, at most kTileCols wide. A ragged last tile goes through a spare one, so that no
// row outside the panel is written.
template <class P, int kVectors, Stride kStride, bool kAdd>
void panel(long rows, long depth, Matrix<const typename P::Unit> a,
           Matrix<const typename P::Unit> b, Matrix<typename P::Scalar> c) {
  using T = typename P::Scalar;
  const long step = kStride == Stride::rows ? a.stride : 1;
  long i = 0, ahead = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    // every tile asks for its share of the panel of B that comes next
    for (const long until = depth * (i + kTileRows) / rows; ahead < until; ++ahead) {
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) {
        __builtin_prefetch(b.at(ahead, kTileCols<T> + v * kWidth<T>).data, 0, 2);
      }
    }
    tile<P, kVectors, kStride, kAdd>(depth, {a.data + i * step, a.stride}, b, c.at(i, 0));
  }
  if (i == rows) return;
  constexpr int kCols = kVectors * kWidth<T>;
  alignas(64) T spare[kTileRows * kCols];
  tile<P, kVectors, kStride, false>(depth, {a.data + i * step, a.stride}, b, {spare, kCols});
  for (long r = 0; r < rows - i; ++r) {
    for (int j = 0; j < kCols; j += kWidth<T>) {
      T* to = c.at(i + r, j).data;
      const Vec<T> sum = load<T>(spare + r * kCols + j);
      store(to, kAdd ? load<T>(to) + sum : sum);
    }
  }
}

// C [rows, cols] += A B. `cols` is rounded up to whole vectors: C and B must have room for them,
// A for rows rounded up to whole tiles (what those hold does not matter).
template <class P, Stride kStride>
void add_product(long rows, long cols, long depth, Matrix<const typename P::Unit> a,
                 Matrix<const typename P::Unit> b, Matrix<typename P::Scalar> c) {
  if constexpr (kOnTiles<P>) {
    P::template add_product<kStride>(rows, cols, depth, a, b, c);
  } else {
    constexpr int kCols = kTileCols<typename P::Scalar>, kVector = kWidth<typename P::Scalar>;
    for (long j = 0; j < cols; j += kCols) {
      const auto bj = b.at(0, j);
      const auto cj = c.at(0, j);
      switch (std::min<long>(kTileVectors, (cols - j + kVector - 1) / kVector)) {
        case 1:
          panel<P, 1, kStride, true>(rows, depth, a, bj, cj);
          break;
        case 2:
          panel<P, 2, kStride, true>(rows, depth, a, bj, cj);
          break;
        case 3:
          panel<P, std::min(3, kTileVectors), kStride, true>(rows, depth, a, bj, cj);
          break;
        default:
          panel<P, kTileVectors, kStride, true>(rows, depth, a, bj, cj);
      }
    }
  }
}

}  // namespace mmfast::MMFAST_LEVEL

#pragma once
#include "pack.h"

// bf16 products on the matrix unit (Intel AMX), whose registers hold 16 rows of 16 units: 17 times
// the rate of dpbf16 on the Xeon it was measured on, from the same packed operands.
//   A  row i: units along the summed dimension, zeros up to a multiple of 16
//   B  line p: unit p of 16 neighbouring columns
namespace mmfast::MMFAST_LEVEL {

#if defined(__AMX_BF16__)
struct AMX {
  using Scalar = float;
  using Unit = uint32_t;
  static constexpr int kPack = 2, kRows = 32, kDepth = 16;

  // as the functions of these names, which call them; C of a strip has room for rows rounded up to
  // kRows, and lines of B behind `depth`, up to a multiple of kDepth, are multiplied by zeros
  static void strip(long rows, long depth, Matrix<const Unit> a, const Unit* panel,
                    Matrix<float> c);
  template <Stride kStride>
  static void add_product(long rows, long cols, long depth, Matrix<const Unit> a,
                          Matrix<const Unit> b, Matrix<float> c);
};

// The registers, for as long as it lives: 0-3 a C of 2x2 tiles, 4-5 its A, 6-7 its B. Other
// libraries on this thread set them up anew, and an idle set makes switches of threads slow.
template <>
struct TileRegisters<AMX> {
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
  }
  TileRegisters(const TileRegisters&) = delete;
  ~TileRegisters() { _tile_release(); }
};

// C (+)= A B for 16 kM rows and 16 kN columns; `b_next` is where B's second 16 columns stand.
template <int kM, int kN, bool kAdd>
inline void tiles(long depth, Matrix<const uint32_t> a, Matrix<const uint32_t> b, long b_next,
                  Matrix<float> c) {
  const long a_bytes = 4 * a.stride, b_bytes = 4 * b.stride, c_bytes = 4 * c.stride;
  float *const low = c.data, *const high = c.data + 16 * c.stride;
  asm volatile("" ::: "memory");  // gcc's intrinsics do not say that they read memory
  if constexpr (kAdd) {
    _tile_loadd(0, low, c_bytes);
    if constexpr (kN > 1) _tile_loadd(1, low + 16, c_bytes);
    if constexpr (kM > 1) _tile_loadd(2, high, c_bytes);
    if constexpr (kM > 1 && kN > 1) _tile_loadd(3, high + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long p = 0; p < depth; p += AMX::kDepth) {
    const uint32_t *const x = a.data + p, *const y = b.data + p * b.stride;
    _tile_loadd(6, y, b_bytes);
    _tile_loadd(4, x, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kN > 1) {
      _tile_loadd(7, y + b_next, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kM > 1) {
      _tile_loadd(5, x + 16 * a.stride, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kM > 1 && kN > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, low, c_bytes);
  if constexpr (kN > 1) _tile_stored(1, low + 16, c_bytes);
  if constexpr (kM > 1) _tile_stored(2, high, c_bytes);
  if constexpr (kM > 1 && kN > 1) _tile_stored(3, high + 16, c_bytes);
}

// The same for at most 32 rows and columns; rows of C behind the last are not written.
template <bool kAdd>
inline void corner(long rows, long cols, long depth, Matrix<const uint32_t> a,
                   Matrix<const uint32_t> b, long b_next, Matrix<float> c) {
  const auto run = [&](Matrix<float> to) {
    if (rows > 16) {
      cols > 16 ? tiles<2, 2, kAdd>(depth, a, b, b_next, to)
                : tiles<2, 1, kAdd>(depth, a, b, b_next, to);
    } else {
      cols > 16 ? tiles<1, 2, kAdd>(depth, a, b, b_next, to)
                : tiles<1, 1, kAdd>(depth, a, b, b_next, to);
    }
  };
  if (rows % 16 == 0) return run(c);
  alignas(64) float spare[32 * 32] = {};
  const size_t bytes = (cols > 16 ? 32 : 16) * sizeof(float);
  for (long r = 0; kAdd && r < rows; ++r) std::memcpy(spare + r * 32, c.at(r, 0).data, bytes);
  run({spare, 32});
  for (long r = 0; r < rows; ++r) std::memcpy(c.at(r, 0).data, spare + r * 32, bytes);
}

inline void AMX::strip(long rows, long depth, Matrix<const Unit> a, const Unit* panel,
                       Matrix<float> c) {
  for (long i = 0; i < rows; i += kRows) {
    for (long j = 0; j < kTileCols<float>; j += 32) {
      tiles<2, 2, false>(depth, a.at(i, 0), {panel + j * depth, 16}, 16 * depth, c.at(i, j));
    }
  }
}

template <Stride kStride>
void AMX::add_product(long rows, long cols, long depth, Matrix<const Unit> a, Matrix<const Unit> b,
                      Matrix<float> c) {
  constexpr long kTurned = padded<float>(kBlock / kPack);
  alignas(64) Unit turned[kRows * kTurned];
  for (long i = 0; i < rows; i += kRows) {
    Matrix<const Unit> block = {a.data + i * (kStride == Stride::rows ? a.stride : 1), a.stride};
    if constexpr (kStride == Stride::depth) {
      block = {turned, kTurned};
      for (long r = 0; r < kRows && i + r < rows; r += 16) {
        for (long p = 0; p < depth; p += 16) {
          Vec<float> lines[16];
          for (long l = 0; l < 16; ++l) {
            lines[l] = p + l < depth ? load<float>(a.at(p + l, i + r).data) : Vec<float>{};
          }
          transpose<float>(lines);
          for (long l = 0; l < 16; ++l) {
            store(reinterpret_cast<float*>(turned + (r + l) * kTurned + p), lines[l]);
          }
        }
      }
    }
    for (long j = 0; j < cols; j += 32) {
      corner<true>(std::min<long>(kRows, rows - i), cols - j, depth, block, b.at(0, j), 16,
                   c.at(i, j));
    }
  }
}
#endif

}  // namespace mmfast::MMFAST_LEVEL

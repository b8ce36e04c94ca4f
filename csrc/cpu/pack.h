#pragma once
#include <cstring>

#include "../view.h"
#include "memory.h"
#include "microkernel.h"
#include "vmath.h"

// Operands as the tile reads them, made once a call. Widening of half types happens here, and
// rounding back to them where results leave.
namespace mmfast::MMFAST_LEVEL {

inline float float_of_bf16(uint16_t h) {
  const uint32_t bits = uint32_t{h} << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint16_t bf16_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : (bits >> 16) | 0x40;
}

inline float float_of_f16(uint16_t h) {
  // shifting puts the exponent 112 too low; multiplying by 2^112 mends it, denormals included
  const uint32_t magnitude = uint32_t{h & 0x7fffu} << 13, sign = uint32_t{h & 0x8000u} << 16;
  const uint32_t two112 = 0x77800000, top = magnitude >= 0x0f800000 ? 0x7f800000 : 0;
  float x, scale;
  std::memcpy(&x, &magnitude, 4);
  std::memcpy(&scale, &two112, 4);
  x *= scale;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits |= sign | top;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint16_t f16_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to inf
  if (bits < 0x38800000) {                       // denormal: let an addition round
    float y;
    std::memcpy(&y, &bits, 4);
    y += 0.5f;
    uint32_t half;
    std::memcpy(&half, &y, 4);
    return sign | (half - 0x3f000000);
  }
  return sign | ((bits + 0xfff + ((bits >> 13) & 1) - 0x38000000) >> 13);
}

// Row i of a matrix as scalars of the accumulator.
template <class T>
inline void read_row(const View& x, long i, T* out) {
  const long row = i * x.row_stride;
  const auto each = [&](auto* data, auto convert) {
    for (long d = 0; d < x.cols; ++d) out[d] = convert(data[row + d]);
  };
  switch (x.type) {
    case Type::f32:
      each(static_cast<const float*>(x.data), [](float v) { return v; });
      break;
    case Type::f64:
      each(static_cast<const double*>(x.data), [](double v) { return v; });
      break;
    case Type::bf16:
      each(static_cast<const uint16_t*>(x.data), float_of_bf16);
      break;
    default:
      each(static_cast<const uint16_t*>(x.data), float_of_f16);
  }
}

// factor * values into row i of a matrix.
template <class T>
inline void write_row(const View& x, long i, const T* values, T factor) {
  const long row = i * x.row_stride;
  const auto each = [&](auto* data, auto convert) {
    for (long d = 0; d < x.cols; ++d) data[row + d] = convert(factor * values[d]);
  };
  switch (x.type) {
    case Type::f32:
      each(static_cast<float*>(x.data), [](T v) { return float(v); });
      break;
    case Type::f64:
      each(static_cast<double*>(x.data), [](T v) { return double(v); });
      break;
    case Type::bf16:
      each(static_cast<uint16_t*>(x.data), bf16_of_float);
      break;
    default:
      each(static_cast<uint16_t*>(x.data), f16_of_float);
  }
}

inline long round_up(long n, long to) { return (n + to - 1) / to * to; }

// A row stride of at least n scalars: whole vectors, and an odd number of them, so that rows below
// one another do not meet in a few sets of the cache.
template <class T>
constexpr long padded(long n) {
  return (((n + kWidth<T> - 1) / kWidth<T>) | 1) * kWidth<T>;
}

// Sizes of packed operands of width D. Lanes of a vector hold units: D scalars, or D/2 pairs.
template <class P>
struct Shape {
  using T = typename P::Scalar;
  long D, units, depth, stride, depth_stride;  // depth: units, whole steps of the arithmetic
  explicit Shape(long width)
      : D(width),
        units((width + P::kPack - 1) / P::kPack),
        depth(round_up(units, P::kDepth)),
        stride(padded<T>(units)),
        depth_stride(padded<T>(width)) {}
};

// Row i: units along D, zero behind them. Serves as A of S = q kT and, where units are single, as B
// of the gradients.
template <class P>
inline void pack_row(const View& x, long i, const Shape<P>& shape, typename P::Unit* out) {
  using Unit = typename P::Unit;
  if constexpr (P::kPack == 1) {
    read_row(x, i, out);
  } else {
    out[shape.units - 1] = 0;
    std::memcpy(out, static_cast<const uint16_t*>(x.data) + i * x.row_stride, 2 * x.cols);
  }
  std::memset(out + shape.units, 0, (shape.stride - shape.units) * sizeof(Unit));
}

// kTileCols rows side by side, [depth, kTileCols]: B of S = q kT. `rows` may be fewer. A matrix
// unit wants what one of its registers holds together: [kTileCols / kWidth, depth, kWidth].
template <class P>
inline void pack_panel(const typename P::Unit* packed, long rows, const Shape<P>& shape,
                       typename P::Unit* out) {
  using T = typename P::Scalar;
  using Unit = typename P::Unit;
  constexpr long kCols = kTileCols<T>, kLine = kOnTiles<P> ? kWidth<T> : kCols;
  for (long d = 0; d < shape.depth; d += kWidth<T>) {
    for (long j = 0; j < kCols; j += kWidth<T>) {
      Vec<T> block[kWidth<T>];
      for (long r = 0; r < kWidth<T>; ++r) {
        block[r] = j + r < rows ? load<T>(packed + (j + r) * shape.stride + d) : Vec<T>{};
      }
      transpose<T>(block);
      const long depth = std::min<long>(kWidth<T>, shape.depth - d);
      Unit* to = out + (kOnTiles<P> ? j * shape.depth : j) + d * kLine;
      for (long p = 0; p < depth; ++p) store(reinterpret_cast<T*>(to + p * kLine), block[p]);
    }
  }
}

// Rows i and i + 1 interleaved, [D] pairs: B of the gradients for bf16, where the summed dimension
// is the row.
inline void pack_pair(const View& x, long i, long stride, uint32_t* out) {
  const auto* first = static_cast<const uint16_t*>(x.data) + i * x.row_stride;
  const auto* second = first + x.row_stride;
  const bool last = i + 1 == x.rows;
  for (long d = 0; d < x.cols; ++d) out[d] = first[d] | (last ? 0u : uint32_t{second[d]} << 16);
  std::memset(out + x.cols, 0, (stride - x.cols) * 4);
}

}  // namespace mmfast::MMFAST_LEVEL

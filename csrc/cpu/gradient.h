#pragma once
#include "sweep.h"

// From a tile of G = dL/d<q_i, k_j> to the gradients of both sides: dq += G k and dk += GT q, from
// the same tile. The op's epilogue writes G strip by strip; no float is added by two threads.
namespace mmfast::MMFAST_LEVEL {

#if defined(__AVX512BF16__)
// A tile of G rounded to bf16: pairs along its columns, and pairs along its rows.
[[gnu::always_inline]] inline void place(const Sums<float>& s, uint32_t* along_columns,
                                         uint32_t* along_rows, long stride) {
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = i / 2 + i % 2 * 16;
  const __m512i interleave = _mm512_load_si512(order);
  const auto pair = [](Vec<float> low, Vec<float> high) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  };
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; v += 2) {
      _mm512_storeu_si512(along_columns + i * stride + v * 8, pair(s[i][v], s[i][v + 1]));
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; i += 2) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {
      _mm512_storeu_si512(along_rows + i / 2 * stride + v * 16,
                          _mm512_permutexvar_epi16(interleave, pair(s[i][v], s[i + 1][v])));
    }
  }
}
#endif

// <a, b> in f64, in a few sums at once.
template <class T>
inline double inner(const T* a, const T* b, long n) {
  double parts[8] = {};
  long d = 0;
  for (; d + 8 <= n; d += 8) {
    for (int i = 0; i < 8; ++i) parts[i] += double(a[d + i]) * double(b[d + i]);
  }
  for (; d < n; ++d) parts[0] += double(a[d]) * double(b[d]);
  double sum = 0;
  for (const double part : parts) sum += part;
  return sum;
}

// Where a gradient gathers: in the output itself if it has the accumulator's type and whole
// vectors, in `copies` matrices of our own otherwise.
template <class T>
struct Accumulator {
  View out;
  long stride = 0, copies = 1;
  Buffer<T> own;
  T* data = nullptr;

  Accumulator(const View& gradient, long n) : out(gradient), copies(n) {
    if (!out) return;
    const bool direct = copies == 1 && out.cols % kWidth<T> == 0 && out.row_stride == out.cols &&
                        out.type == (sizeof(T) == 8 ? Type::f64 : Type::f32);
    stride = direct ? out.cols : padded<T>(out.cols);
    if (!direct) own = Buffer<T>(copies * out.rows * stride);
    data = direct ? static_cast<T*>(out.data) : static_cast<T*>(own);
  }
  Matrix<T> at(long i, long copy = 0) const {
    return {data + (copy * out.rows + i) * stride, stride};
  }
  void clear(long i) const {
    for (long c = 0; out && c < copies; ++c) std::fill_n(at(i, c).data, stride, T{0});
  }
  // Row i: copies added, the scale applied, rounded. Returns <x_i, sum>, for the scale's gradient.
  double finish(long i, T scale, const View* x, T* spare) const {
    T* sum = at(i).data;
    for (long c = 1; c < copies; ++c) {
      for (long d = 0; d < out.cols; ++d) sum[d] += at(i, c).data[d];
    }
    double dot = 0;
    if (x) {
      read_row(*x, i, spare);
      dot = inner(sum, spare, out.cols);
    }
    write_row(out, i, sum, scale);
    return dot;
  }
};

// G in the order in which each product broadcasts it: units along its columns for dq, along its
// rows for dk. Single units are one matrix read both ways; bf16 pairs are two.
template <class P>
class Gradients {
 public:
  using T = typename P::Scalar;
  using Unit = typename P::Unit;
  static constexpr long kCols = kTileCols<T>;
  static constexpr bool kPairs = P::kPack == 2;

  Gradients(const View& q, const View& k, const View& dq, const View& dk, const Scores<P>& scores,
            Grid grid, const Run& run)
      : q_(q), k_(k), groups_(grid.groups), q_sum_(dq, 1), k_sum_(dk, grid.teams()) {
    const long stride = kPairs ? scores.shape.depth_stride : scores.shape.stride;
    q_operand_ = {scores.rows, stride};
    k_operand_ = {scores.k_rows, stride};
    storage_ = Buffer<Unit>(run.threads * (kPairs ? 2 : 1) * kTile);
    if constexpr (kPairs) {
      const auto room = [&](const View& x) {
        const long lines = round_up((x.rows + 1) / 2, P::kDepth);
        Buffer<Unit> pairs(lines * stride);
        std::memset(pairs + x.rows / 2 * stride, 0, (lines - x.rows / 2) * stride * sizeof(Unit));
        return pairs;
      };
      if (dk) q_pairs_ = room(q);
      if (dq) k_pairs_ = room(k);
      q_operand_.data = q_pairs_;
      k_operand_.data = k_pairs_;
    }
    const auto prepare = [&](const View& x, const Accumulator<T>& sum, Unit* pairs) {
      Scores<P>::for_each_chunk(x.rows, run, [&, pairs](long begin, long end, int) {
        for (long i = begin; i < end; ++i) sum.clear(i);
        if constexpr (kPairs) {
          for (long i = begin; pairs && i < end; i += 2) {
            pack_pair(x, i, stride, pairs + i / 2 * stride);
          }
        }
      });
    };
    prepare(q, q_sum_, q_pairs_);
    prepare(k, k_sum_, k_pairs_);
  }

  // A tile of G, `r` rows and `c` columns into the block. Rows behind the last are zero.
  [[gnu::always_inline]] void put(int thread, long r, long c, const Sums<T>& s) const {
    Unit* block = storage_ + thread * (kPairs ? 2 : 1) * kTile;
    if constexpr (kPairs) {
      place(s, block + r * kStride + c / 2, block + kTile + r / 2 * kStride + c, kStride);
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) {
          store(block + (r + i) * kStride + c + v * kWidth<T>, s[i][v]);
        }
      }
    }
  }

  // Adds the block of `count` rows from i on and `width` columns from j on.
  void add(int thread, long lane, long i, long count, long j, long width) const {
    const Unit* along_columns = storage_ + thread * (kPairs ? 2 : 1) * kTile;
    const Unit* along_rows = along_columns + (kPairs ? kTile : 0);
    const auto units = [](long n) { return (n + P::kPack - 1) / P::kPack; };
    if (q_sum_.out) {
      add_product<P, Stride::rows>(count, q_.cols, units(width), {along_columns, kStride},
                                   k_operand_.at(j / P::kPack, 0), q_sum_.at(i));
    }
    if (k_sum_.out) {
      add_product<P, Stride::depth>(width, q_.cols, units(count), {along_rows, kStride},
                                    q_operand_.at(i / P::kPack, 0), k_sum_.at(j, lane / groups_));
    }
  }

  // Multiplies what lanes of this one's team added to row j of dk.
  void scale_k(long lane, long j, T factor) const {
    T* sum = k_sum_.at(j, lane / groups_).data;
    for (long d = 0; d < q_.cols; ++d) sum[d] *= factor;
  }

  // Writes dq and dk. The scale's gradient is free here: sum_i <q_i, sum_j G_ij k_j>, or the same
  // from the side of k.
  double finish(double scale, bool need_scale, const Run& run) const {
    Buffer<T> spare(run.threads * q_.cols);
    const auto side = [&](const View& x, const Accumulator<T>& sum, bool dot) {
      std::vector<double> parts((x.rows + kCols - 1) / kCols, 0.0);
      if (!sum.out) return 0.0;
      Scores<P>::for_each_chunk(x.rows, run, [&](long begin, long end, int thread) {
        for (long i = begin; i < end; ++i) {
          parts[begin / kCols] +=
              sum.finish(i, T(scale), dot ? &x : nullptr, spare + thread * q_.cols);
        }
      });
      double total = 0;
      for (const double part : parts) total += part;
      return total;
    };
    const double from_q = side(q_, q_sum_, need_scale);
    const double from_k = side(k_, k_sum_, need_scale && !q_sum_.out);
    return q_sum_.out ? from_q : from_k;
  }

 private:
  static constexpr long kStride = padded<T>(kBlock + kTileRows);
  static constexpr long kTile = (kBlock + kTileRows) * kStride;

  View q_, k_;
  long groups_;
  Accumulator<T> q_sum_, k_sum_;
  Buffer<Unit> storage_, q_pairs_, k_pairs_;
  Matrix<const Unit> q_operand_, k_operand_;
};

}  // namespace mmfast::MMFAST_LEVEL

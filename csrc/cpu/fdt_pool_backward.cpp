// fdt_pool, backward: only codes of a weight that is not 0 are visited: <g, code>, then dz of a
// sample from them, then dz code to the winning token and dz token + weight g to the code. Where
// most codes have a weight, <g, code> and weight g are products. No two threads write one place,
// and whoever gathers does so in a fixed order.
//   f32, bf16, f16 in -> f32 sums, gradients in the input's type;  f64 in -> f64
#include "picked.h"
#include "sweep.h"

namespace mmfast::MMFAST_LEVEL {
namespace {

template <class E>
class Backward {
 public:
  using T = Wide<E>;

  Backward(const TokenPool& in, const View& g_pooled, const View& g_weights, const View& weights,
           const View& winners, const Run& run)
      : in_(in),
        run_(run),
        g_(g_pooled),
        g_weights_(g_weights),
        weights_(weights),
        winners_(winners),
        B_(weights.rows),
        C_(weights.cols),
        D_(in.codebook.cols),
        N_(in.tokens.cols / D_),
        support_(weights),
        slopes_(B_ * C_),
        shares_(B_) {
    for_each(B_, run, [&](long b, int) {
      support_.find(b);
      std::fill_n(slopes_ + b * C_, support_.count(b), T{0});
    });
  }

  // dz, in the order of the support's lists.
  void slopes() {
    if (g_) {
      with_arithmetic(in_.tokens.type, [&](auto arithmetic) {
        using P = decltype(arithmetic);
        if constexpr (std::is_same_v<typename P::Scalar, T>) products<P>();
      });
    }
    for_each(B_, run_, [&](long b, int) { normalized(b); });
  }

  // Tokens, and sum <dtoken, token> / scale. The sums of a few samples and of a part of the width
  // stay in a near cache while all codes pass by.
  double tokens(const View& out, bool need_scale) const {
    constexpr long kSamples = 16, kCodes = 512;
    const long chunks = (D_ + kChunk - 1) / kChunk, lanes = (B_ + kSamples - 1) / kSamples;
    std::vector<double> parts(lanes * chunks, 0.0);
    Buffer<T> all(run_.threads * kSamples * N_ * kChunk), near(run_.threads * kCodes * kChunk);
    for_each(lanes * chunks, run_, [&](long task, int thread) {
      T* const sums = all + thread * kSamples * N_ * kChunk;
      T* const codes = near + thread * kCodes * kChunk;
      const long first = task / chunks * kSamples, last = std::min(B_, first + kSamples);
      const long d = task % chunks * kChunk, width = std::min(kChunk, D_ - d);
      std::fill_n(sums, (last - first) * N_ * kChunk, T{0});
      for (long c = 0; c < C_; c += kCodes) {
        const long end = std::min(C_, c + kCodes);
        const bool dense = support_.dense(first, last, c, end);
        for (long u = c; dense && u < end; ++u) {
          widen_row(codes + (u - c) * kChunk, T{1}, &in_.codebook.at<E>(u, d), width);
        }
        for (long b = first; b < last; ++b) {
          const auto range = support_.among(b, c, end);
          for (long k = range.begin; k < range.end; ++k) {
            const long code = range.codes[k], n = winner(b, code);
            if (n < 0) continue;
            T* const sum = sums + ((b - first) * N_ + n) * kChunk;
            const T slope = slopes_[b * C_ + k];
            dense ? add_row(sum, slope, codes + (code - c) * kChunk, kChunk)
                  : add_row(sum, slope, &in_.codebook.at<E>(code, d), width);
          }
        }
      }
      for (long b = first; b < last; ++b) {
        for (long n = 0; n < N_; ++n) {
          const T* const sum = sums + ((b - first) * N_ + n) * kChunk;
          if (need_scale) parts[task] += inner(sum, &in_.tokens.at<E>(b, n * D_ + d), width);
          if (out) write_sum(&out.at<E>(b, n * D_ + d), sum, T(in_.scale), width);
        }
      }
    });
    double total = 0;
    for (const double part : parts) total += part;
    return total;
  }

  void codebook(const View& out) const {
    expect_writes(out.data, out.rows * out.cols * sizeof(E));
    std::vector<Codes> benches;
    for (int t = 0; t < run_.threads; ++t) benches.emplace_back(B_, N_);
    for_each((C_ + Codes::kCount - 1) / Codes::kCount, run_, [&](long task, int thread) {
      const long first = task * Codes::kCount;
      codes(first, std::min(C_, first + Codes::kCount), benches[thread], out);
    });
  }

 private:
  // What one thread works on: the sums of some codes, of a part of the width, and operands near by.
  struct Codes {
    static constexpr long kCount = 512, kStride = kCount + kTileRows;
    bool met[kCount];
    Buffer<T> sums, upstream, weights, tokens;
    Codes(long B, long N)
        : sums(kCount * kChunk), upstream(B * kChunk), weights(B * kStride), tokens(N * kChunk) {}
  };

  // -1 where none wins
  long winner(long b, long c) const {
    const long n = winners_.at<int32_t>(b, c);
    return n < N_ ? n : -1;
  }

  // <g, code> of all pairs, by panels of codes.
  template <class P>
  void products() {
    constexpr long kCols = kTileCols<T>;
    using Unit = typename P::Unit;
    const Shape<P> shape(D_);
    Buffer<Unit> rows((B_ + P::kRows) * shape.stride), spare(run_.threads * kCols * shape.stride);
    Buffer<Unit> panels(run_.threads * kCols * shape.depth);
    Buffer<T> scores(run_.threads * (B_ + P::kRows) * kCols);
    for (long b = 0; b < B_; ++b) pack_row<P>(g_, b, shape, rows + b * shape.stride);
    std::memset(rows + B_ * shape.stride, 0, P::kRows * shape.stride * sizeof(Unit));
    for_each((C_ + kCols - 1) / kCols, run_, [&](long task, int thread) {
      const TileRegisters<P> held;
      const long c = task * kCols, end = std::min(C_, c + kCols);
      if (!support_.dense(0, B_, c, end)) return picked(c, end);
      Unit* const codes = spare + thread * kCols * shape.stride;
      Unit* const panel = panels + thread * kCols * shape.depth;
      T* const s = scores + thread * (B_ + P::kRows) * kCols;
      for (long u = c; u < end; ++u) {
        pack_row<P>(in_.codebook, u, shape, codes + (u - c) * shape.stride);
      }
      pack_panel<P>(codes, end - c, shape, panel);
      strip<P>(B_, shape.depth, {rows, shape.stride}, panel, {s, kCols});
      for (long b = 0; b < B_; ++b) {
        const auto range = support_.among(b, c, end);
        for (long k = range.begin; k < range.end; ++k) {
          slopes_[b * C_ + k] = s[b * kCols + range.codes[k] - c];
        }
      }
    });
  }

  // The same one by one.
  void picked(long begin, long end) {
    for (long b = 0; b < B_; ++b) {
      const E* const g = &g_.at<E>(b);
      const auto range = support_.among(b, begin, end);
      for (long k = range.begin; k < range.end; ++k) {
        const E* const code = &in_.codebook.at<E>(range.codes[k]);
        Vec<T> sums = {};
        for (long d = 0; d < D_; d += kChunk) {
          const long width = std::min(kChunk, D_ - d);
          each_span(code + d, width, [&](long at, Span<E> x, long count) {
            const Span<E> y = read(g + d + at, count);
            for (int p = 0; p < kParts<E>; ++p) sums += x.parts[p] * y.parts[p];
          });
        }
        slopes_[b * C_ + k] = T(sum_of_lanes<T>(sums));
      }
    }
  }

  // From <g, code> to dz; a code's share of g is its weight / shares_[b].
  void normalized(long b) {
    const T* const w = &weights_.at<T>(b);
    T* const v = slopes_ + b * C_;
    const auto [codes, begin, count] = support_.all_of(b);
    double total = 1, mean = 0;
    if (in_.normalize == Normalize::sigmoid) {
      total = 0;
      for (long k = 0; k < count; ++k) total += w[codes[k]];
      for (long k = 0; k < count; ++k) mean += double(w[codes[k]]) * v[k] / total;
      for (long k = 0; k < count; ++k) {
        const T weight = w[codes[k]];
        v[k] = weight * (1 - weight) * (T((v[k] - mean) / total) + upstream(b, codes[k]));
      }
    } else {
      const bool sparse = in_.normalize == Normalize::sparsemax;
      for (long k = 0; k < count; ++k) {
        v[k] += upstream(b, codes[k]);
        mean += sparse ? v[k] / double(count) : double(w[codes[k]]) * v[k];
      }
      for (long k = 0; k < count; ++k) v[k] = T(v[k] - mean) * (sparse ? T{1} : w[codes[k]]);
    }
    shares_[b] = total == 0 ? T{1} : T(total);
  }

  T upstream(long b, long c) const { return g_weights_ ? g_weights_.at<T>(b, c) : T{0}; }

  // <sum, row>; what stands at a padded place, whose sum is 0, is not looked at
  static double inner(const T* sum, const E* row, long count) {
    double total = 0;
    each_span(row, count, [&](long d, Span<E> x, long) {
      for (int p = 0; p < kParts<E>; ++p) {
        const Vec<T> s = load<T>(sum + d + p * kWidth<T>);
        total += sum_of_lanes<T>(select<T>(s != 0, s * x.parts[p], Vec<T>{}));
      }
    });
    return total;
  }

  void codes(long first, long end, Codes& bench, const View& out) const {
    std::fill_n(bench.met, Codes::kCount, false);
    for (long b = 0; b < B_; ++b) {
      const auto range = support_.among(b, first, end);
      for (long k = range.begin; k < range.end; ++k) bench.met[range.codes[k] - first] = true;
    }
    // where the support is small most codes have no sample
    for (long c = first; c < end; ++c) {
      if (!bench.met[c - first]) std::memset((void*)&out.at<E>(c), 0, D_ * sizeof(E));
    }
    const bool dense = support_.dense(0, B_, first, end);
    for (long b = 0; dense && b < B_; ++b) {
      std::copy_n(&weights_.at<T>(b, first), end - first, bench.weights + b * Codes::kStride);
    }
    for (long d = 0; d < D_; d += kChunk) {
      const long width = std::min(kChunk, D_ - d);
      for (long c = 0; c < end - first; ++c) {
        if (bench.met[c]) std::fill_n(bench.sums + c * kChunk, kChunk, T{0});
      }
      if (dense && g_) values(end - first, d, width, bench);
      for (long b = 0; b < B_; ++b) from_sample(b, first, end, d, width, dense, bench);
      for (long c = first; c < end; ++c) {
        if (!bench.met[c - first]) continue;
        write_sum(&out.at<E>(c, d), bench.sums + (c - first) * kChunk, T{1}, width);
      }
    }
  }

  // sums += weightsT g, of all samples.
  void values(long count, long d, long width, Codes& bench) const {
    for (long b = 0; b < B_; ++b) {
      widen_row(bench.upstream + b * kChunk, 1 / shares_[b], &g_.at<E>(b, d), width);
    }
    add_product<Plain<T>, Stride::depth>(count, round_up(width, kSpan<E>), B_,
                                         {bench.weights, Codes::kStride}, {bench.upstream, kChunk},
                                         {bench.sums, kChunk});
  }

  // sums += what sample b adds, where dense without the values.
  void from_sample(long b, long first, long end, long d, long width, bool dense,
                   Codes& bench) const {
    const auto token = [&](long n) { return &in_.tokens.at<E>(b, n * D_ + d); };
    for (long n = 0; dense && n < N_; ++n) {
      widen_row(bench.tokens + n * kChunk, T{1}, token(n), width);
    }
    const T* const w = &weights_.at<T>(b);
    const auto range = support_.among(b, first, end);
    for (long k = range.begin; k < range.end; ++k) {
      const long c = range.codes[k], n = winner(b, c);
      T* const sum = bench.sums + (c - first) * kChunk;
      if (!dense && g_) add_row(sum, w[c] / shares_[b], &g_.at<E>(b, d), width);
      if (n < 0) continue;
      const T slope = T(slopes_[b * C_ + k] * in_.scale);
      dense ? add_row(sum, slope, bench.tokens + n * kChunk, kChunk)
            : add_row(sum, slope, token(n), width);
    }
  }

  const TokenPool& in_;
  const Run& run_;
  View g_, g_weights_, weights_, winners_;
  long B_, C_, D_, N_;
  Support<T> support_;
  Buffer<T> slopes_;
  std::vector<T> shares_;
};

}  // namespace

double fdt_pool_backward(const TokenPool& in, View g_pooled, View g_weights, View weights,
                         View winners, View d_tokens, View d_codebook, bool need_scale,
                         const Run& run) {
  double d_scale = 0;
  with_element(in.tokens.type, [&](auto element) {
    Backward<decltype(element)> pass(in, g_pooled, g_weights, weights, winners, run);
    pass.slopes();
    if (d_tokens || need_scale) d_scale = pass.tokens(d_tokens, need_scale);
    if (d_codebook) pass.codebook(d_codebook);
  });
  return d_scale;
}

}  // namespace mmfast::MMFAST_LEVEL

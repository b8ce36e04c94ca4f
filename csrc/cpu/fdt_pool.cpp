// fdt_pool, forward: S = tokens codesT tile by tile, each tile reduced to the best token of every
// sample and code; then a row of C scores a sample, normalised where it stands, and the codes that
// keep a weight.
//   f32, bf16, f16 in -> f32 scores, weights and sums;  f64 in -> f64;  pooled in the input's type
#include "normalize.h"
#include "picked.h"
#include "sweep.h"

namespace mmfast::MMFAST_LEVEL {
namespace {

// The tokens that are there, packed one below the other, so that no tile is filled with padding.
template <class P>
struct Tokens {
  using Unit = typename P::Unit;
  Shape<P> shape;
  std::vector<long> first;       // [B + 1]: where a sample's tokens begin
  std::vector<int32_t> places;   // their places in the sample
  std::vector<int32_t> samples;  // and their samples
  Buffer<Unit> rows;

  Tokens(const TokenPool& in, const Run& run) : shape(in.codebook.cols), first{0} {
    const long D = in.codebook.cols, N = in.tokens.cols / D;
    for (long b = 0; b < in.tokens.rows; ++b) {
      for (long n = 0; n < N; ++n) {
        if (in.mask && !in.mask.at<bool>(b, n)) continue;
        places.push_back(int32_t(n));
        samples.push_back(int32_t(b));
      }
      first.push_back(long(places.size()));
    }
    const long count = first.back();
    rows = Buffer<Unit>((count + P::kRows) * shape.stride);
    // rows that may begin at any element
    const View tokens{in.tokens.data, 0, D, 1, 1, in.tokens.type};
    Scores<P>::for_each_chunk(count, run, [&](long begin, long end, int) {
      for (long i = begin; i < end; ++i) {
        pack_row<P>(tokens, samples[i] * in.tokens.row_stride + places[i] * D, shape, row(i));
      }
    });
    std::memset(row(count), 0, P::kRows * shape.stride * sizeof(Unit));
  }
  Unit* row(long i) const { return rows + i * shape.stride; }
};

// Of every sample and code the largest score, scaled, and its token.
template <class P>
class Best {
 public:
  using T = typename P::Scalar;
  using Int = typename Simd<T>::Int;
  static constexpr long kCols = kTileCols<T>, kPanels = kOnTiles<P> ? 8 : 4;
  // Rows of a strip. On a matrix unit few: while it makes one, the vectors reduce the last one.
  static constexpr long kStep = kOnTiles<P> ? P::kRows : 8 * kTileRows;
  // Rows that meet all panels in hand before others come. On a matrix unit so few that they stay in
  // the first cache, for it takes more than the second one gives.
  static constexpr long kRows = kOnTiles<P> ? P::kRows : kBlock;

  Best(const TokenPool& in, const Tokens<P>& tokens, const View& scores, const View& winners)
      : in_(in), tokens_(tokens), scores_(scores), winners_(winners) {}

  void find(const Run& run) const {
    const long C = in_.codebook.rows, B = in_.tokens.rows;
    const long groups = (C + kPanels * kCols - 1) / (kPanels * kCols);
    // where codes are few, several threads share them; every share packs them anew
    const long shares = std::min(B, (15 + groups) / groups);
    Buffer<Bench> benches(run.threads);
    Buffer<Unit> panels(run.threads * kPanels * kCols * tokens_.shape.depth);
    Buffer<Unit> spare(run.threads * kCols * tokens_.shape.stride);
    for_each(groups * shares, run, [&](long task, int thread) {
      const TileRegisters<P> held;
      Unit* own = panels + thread * kPanels * kCols * tokens_.shape.depth;
      const long c = task / shares * kPanels * kCols, share = task % shares;
      const long count = std::min(kPanels, (C - c + kCols - 1) / kCols);
      for (long p = 0; p < count; ++p) {
        pack(c + p * kCols, spare + thread * kCols * tokens_.shape.stride,
             own + p * kCols * tokens_.shape.depth);
      }
      visit(tokens_.first[B * share / shares], tokens_.first[B * (share + 1) / shares], c, count,
            own, benches[thread]);
    });
  }

 private:
  using Unit = typename P::Unit;

  // What one thread works on: strips of scores, and the best of the sample that is not through yet.
  struct Bench {
    T strips[2][(kStep + P::kRows) * kCols];
    T best[kPanels][kCols];
    Int place[kPanels][kCols];
  };
  // A strip made, and not reduced yet.
  struct Strip {
    long i, count, panel, code;
    const T* scores;
  };

  void pack(long c, Unit* spare, Unit* panel) const {
    const long count = std::min(kCols, in_.codebook.rows - c);
    for (long u = 0; u < count; ++u) {
      pack_row<P>(in_.codebook, c + u, tokens_.shape, spare + u * tokens_.shape.stride);
    }
    pack_panel<P>(spare, count, tokens_.shape, panel);
  }

  void visit(long begin, long end, long code, long panels, const Unit* packed, Bench& bench) const {
    Strip last{};
    long made = 0;
    for (long i = begin; i < end; i += kRows) {
      const long until = std::min(end, i + kRows);
      for (long p = 0; p < panels; ++p) {
        const Unit* panel = packed + p * kCols * tokens_.shape.depth;
        for (long r = i; r < until; r += kStep) {
          T* const s = bench.strips[made++ % 2];
          const Strip next{r, std::min(kStep, until - r), p, code + p * kCols, s};
          strip<P>(next.count, tokens_.shape.depth, {tokens_.row(r), tokens_.shape.stride}, panel,
                   {s, kCols});
          reduce(last, bench);
          last = next;
        }
      }
    }
    reduce(last, bench);
  }

  void reduce(const Strip& s, Bench& bench) const {
    T* const best = bench.best[s.panel];
    Int* const place = bench.place[s.panel];
    for (long i = s.i; i < s.i + s.count;) {
      const long b = tokens_.samples[i], end = std::min(tokens_.first[b + 1], s.i + s.count);
      if (i == tokens_.first[b]) {
        std::fill_n(best, kCols, -kInf<T>);
        std::fill_n(place, kCols, Int{-1});
      }
      take(s.scores + (i - s.i) * kCols, tokens_.places.data() + i, end - i, best, place);
      if (end == tokens_.first[b + 1]) close(b, s.code, best, place);
      i = end;
    }
  }

  // The better of what was and `rows` rows of scores: the first of equal ones, NaN above all.
  static void take(const T* scores, const int32_t* places, long rows, T* best, Int* place) {
    Vec<T> most[kTileVectors], sum[kTileVectors] = {};
    Ints<T> at[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      most[v] = load<T>(best + v * kWidth<T>);
      at[v] = (Ints<T>)load<T>(place + v * kWidth<T>);
    }
    for (long r = 0; r < rows; ++r) {
      const Ints<T> here = Ints<T>{} + Int(places[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const Vec<T> x = load<T>(scores + r * kCols + v * kWidth<T>);
        at[v] = x > most[v] ? here : at[v];
        most[v] = larger<T>(x, most[v]);  // NaN of an earlier strip stays
        sum[v] += x;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      // a sum is NaN where a score is, and seldom elsewhere: infinities of both signs
      if (any<T>(sum[v] != sum[v])) most[v] = with_nan(scores + v * kWidth<T>, rows, most[v]);
      store(best + v * kWidth<T>, most[v]);
      store((T*)place + v * kWidth<T>, (Vec<T>)at[v]);
    }
  }

  static Vec<T> with_nan(const T* scores, long rows, Vec<T> most) {
    Ints<T> lost = most != most;
    for (long r = 0; r < rows; ++r) {
      const Vec<T> x = load<T>(scores + r * kCols);
      lost |= x != x;
    }
    return select<T>(lost, broadcast(std::numeric_limits<T>::quiet_NaN()), most);
  }

  // All tokens of sample b were met.
  void close(long b, long c, const T* best, const Int* place) const {
    const long count = std::min(kCols, in_.codebook.rows - c);
    const bool padded =
        tokens_.first[b + 1] - tokens_.first[b] < in_.tokens.cols / in_.codebook.cols;
    const T other = padded ? T(in_.padded_score) : -kInf<T>, scale = T(in_.scale);
    T* const scores = &scores_.at<T>(b, c);
    int32_t* const winners = &winners_.at<int32_t>(b, c);
    for (long u = 0; u < count; ++u) {
      const T score = best[u] * scale;
      scores[u] = score < other ? other : score;
      winners[u] = score < other ? -1 : int32_t(place[u]);
    }
  }

  const TokenPool& in_;
  const Tokens<P>& tokens_;
  View scores_, winners_;
};

// The row of scores of sample b becomes its weights.
template <class T>
void normalize(const TokenPool& in, long b, bool empty, const View& weights, const View& winners,
               T* scratch) {
  T* const row = &weights.at<T>(b);
  if (empty) {
    std::fill_n(&winners.at<int32_t>(b), winners.cols, -1);
    std::fill_n(row, weights.cols, T(in.padded_score));
    if (in.padded_score == -kInf<double>) {
      std::fill_n(row, weights.cols, T{0});
      return;
    }
  }
  normalize_row(in.normalize, row, weights.cols, scratch);
}

// pooled = weights codes, for some samples and a part of the width at once.
template <class E>
class LookUp {
 public:
  using T = Wide<E>;

  LookUp(const TokenPool& in, const View& weights, const Support<T>& support)
      : in_(in), weights_(weights), support_(support) {}

  void write(const View& pooled, const Run& run) const {
    const long B = pooled.rows, C = in_.codebook.rows, D = pooled.cols;
    const long chunks = (D + kChunk - 1) / kChunk;
    Buffer<Bench> benches(run.threads);
    for_each((B + kSamples - 1) / kSamples * chunks, run, [&](long task, int thread) {
      const long first = task / chunks * kSamples, last = std::min(B, first + kSamples);
      const long d = task % chunks * kChunk, width = std::min(kChunk, D - d);
      Bench& bench = benches[thread];
      std::fill_n(bench.sums[0], kSamples * kChunk, T{0});
      for (long c = 0; c < C; c += kCodes) {
        const long end = std::min(C, c + kCodes);
        if (support_.dense(first, last, c, end)) {
          multiply(first, last, c, end, d, width, bench);
        } else {
          pick(first, last, c, end, d, width, bench);
        }
      }
      for (long b = first; b < last; ++b) {
        const double total =
            in_.normalize == Normalize::sigmoid ? sum_of(&weights_.at<T>(b), C) : 1;
        write_sum(&pooled.at<E>(b, d), bench.sums[b - first], T(1 / (total == 0 ? 1 : total)),
                  width);
      }
    });
  }

 private:
  static constexpr long kSamples = 32, kCodes = 128;
  struct Bench {
    T sums[kSamples][kChunk], weights[kSamples + kTileRows][kCodes], codes[kCodes][kChunk];
  };

  void pick(long first, long last, long c, long end, long d, long width, Bench& bench) const {
    for (long b = first; b < last; ++b) {
      const T* const w = &weights_.at<T>(b);
      const auto range = support_.among(b, c, end);
      for (long k = range.begin; k < range.end; ++k) {
        const long code = range.codes[k];
        add_row(bench.sums[b - first], w[code], &in_.codebook.at<E>(code, d), width);
      }
    }
  }

  void multiply(long first, long last, long c, long end, long d, long width, Bench& bench) const {
    for (long b = first; b < last; ++b) {
      std::copy_n(&weights_.at<T>(b, c), end - c, bench.weights[b - first]);
    }
    for (long code = c; code < end; ++code) {
      widen_row(bench.codes[code - c], T{1}, &in_.codebook.at<E>(code, d), width);
    }
    add_product<Plain<T>, Stride::rows>(last - first, round_up(width, kSpan<E>), end - c,
                                        {bench.weights[0], kCodes}, {bench.codes[0], kChunk},
                                        {bench.sums[0], kChunk});
  }

  const TokenPool& in_;
  View weights_;
  const Support<T>& support_;
};

}  // namespace

void fdt_pool_forward(const TokenPool& in, View pooled, View weights, View winners,
                      const Run& run) {
  with_element(in.tokens.type, [&](auto element) {
    using E = decltype(element);
    Support<Wide<E>> support(weights);
    with_arithmetic(in.tokens.type, [&](auto arithmetic) {
      using P = decltype(arithmetic);
      if constexpr (std::is_same_v<typename P::Scalar, Wide<E>>) {
        const Tokens<P> tokens(in, run);
        Best<P>(in, tokens, weights, winners).find(run);
        const long size = threshold_scratch<Wide<E>>(weights.cols);
        const Buffer<Wide<E>> scratch(size * run.threads);
        for_each(weights.rows, run, [&](long b, int thread) {
          const bool empty = tokens.first[b] == tokens.first[b + 1];
          normalize<Wide<E>>(in, b, empty, weights, winners, scratch + size * thread);
          support.find(b);
        });
      }
    });
    LookUp<E>(in, weights, support).write(pooled, run);
  });
}

}  // namespace mmfast::MMFAST_LEVEL

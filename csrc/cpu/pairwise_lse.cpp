// pairwise_lse: log-sum-exp of the rows and columns of S = scale * q kT, and its gradients.
//   forward   one product; a tile of S is reduced in the registers it was summed in (log_sums.h)
//   backward  the tile again, G from it there, then dq += G k and dk += GT q (gradient.h)
#include <numeric>

#include "gradient.h"
#include "log_sums.h"

namespace mmfast::MMFAST_LEVEL {
namespace {

// exponents that may be split into two factors: 2^(x - top) underflows only below 2^-69 (f32)
template <class T>
constexpr double kReach = sizeof(T) == 8 ? 400 : 57;

// as kForwardDegree: what the rounding of G shows
template <class P>
constexpr int kBackwardDegree = P::kPack == 2 ? 3 : 5;

template <class P>
void forward(const Pairs& pairs, const View& rows, const View& columns, const Run& run) {
  using T = typename P::Scalar;
  constexpr long kCols = kTileCols<T>;
  const long N = pairs.q.rows, M = pairs.k.rows;
  const Cut lanes(N), groups(M);
  const Grid grid{lanes.count, groups.count};
  const Scores<P> scores(pairs.q, pairs.k, false, run);
  const LeftOut<T> left_out(pairs);
  const T scale = T(pairs.scale * kLog2e);

  const long padded_M = round_up(M, kCols);
  LogSums<T> row_state(N), column_state(columns ? grid.teams() * padded_M : 0);
  Buffer<Strip<P, kForwardDegree<P>>> strips(run.threads);
  // whether one maximum did for the last strip of a lane; it says much of the next one
  std::vector<char> trust(lanes.count, true);
  sweep(grid, run, [&](long lane, long group, int thread) {
    const TileRegisters<P> held;
    auto& strip = strips[thread];
    LogSums<T>* const out = columns ? &column_state : nullptr;
    const long shift = lane / grid.groups * padded_M;
    for (long i = lanes.begin(lane); i < lanes.end(lane); i += kBlock) {
      const long count = std::min(kBlock, lanes.end(lane) - i);
      for (long j = groups.begin(group); j < groups.end(group); j += kCols) {
        if (trust[lane]) trust[lane] = strip.sum(scores, left_out, scale, i, count, j);
        if (trust[lane]) {
          strip.merge(row_state, i, count, out, shift + j);
        } else {
          trust[lane] =
              strip.merge_exactly(scores, left_out, scale, row_state, i, count, out, shift + j, j);
        }
      }
    }
  });

  const auto write = [&](const View& out, const LogSums<T>& state, long copies) {
    if (!out) return;
    Scores<P>::for_each_chunk(out.rows, run, [&](long begin, long end, int) {
      for (long i = begin; i < end; ++i) out.at<T>(i) = T(state.total(i, copies, padded_M).log());
    });
  };
  write(rows, row_state, 1);
  write(columns, column_state, grid.teams());
}

// One side's share of G: weight * 2^(score - lse), lse in units of log 2.
template <class T>
struct Side {
  bool there;
  Buffer<T> weight;
  Buffer<double> lse;
  Side(const View& g, const View& values) : there(g) {
    if (!there) return;
    weight = Buffer<T>(g.rows + kTileCols<T>);
    lse = Buffer<double>(g.rows + kTileCols<T>);
    for (long i = 0; i < g.rows; ++i) {
      // an empty row has no gradient: +inf makes every power of it 0
      const double value = values.at<T>(i) * kLog2e;
      weight[i] = g.at<T>(i);
      lse[i] = value == -kInf<double> ? kInf<double> : value;
    }
    for (long i = g.rows; i < g.rows + kTileCols<T>; ++i) weight[i] = 0, lse[i] = kInf<double>;
  }
};

template <class P>
struct Backward {
  using T = typename P::Scalar;
  static constexpr long kRows = kWidth<T>;
  static constexpr int kDegree = kBackwardDegree<P>;

  const LeftOut<T> left_out;
  const T scale;
  Side<T> rows, columns;

  Backward(const Pairs& p, const View& g_rows, const View& g_columns, const View& r, const View& c)
      : left_out(p), scale(T(p.scale * kLog2e)), rows(g_rows, r), columns(g_columns, c) {}

  // The weights of one block with its powers split: G = 2^(score - top) * (a_i + b_j).
  struct Factors {
    T top;
    bool split;
    alignas(64) T a[kBlock + kTileCols<T>], b[kBlock + kTileCols<T>];
  };

  void weigh(long i, long count, long j, long width, Factors& f) const {
    double high = -kInf<double>, low = kInf<double>;
    const auto reach = [&](const Side<T>& side, long at, long n) {
      for (long r = at; side.there && r < at + n; ++r) {
        if (!std::isfinite(side.lse[r])) continue;
        high = std::max(high, side.lse[r]);
        low = std::min(low, side.lse[r]);
      }
    };
    reach(rows, i, count);
    reach(columns, j, width);
    f.split = !(high - low > kReach<T>);
    f.top = high == -kInf<double> ? 0 : T(high);
    const auto split = [&](const Side<T>& side, long at, long n, T* out) {
      for (long r = 0; r < n; r += kRows) {
        Vec<T> x = {}, weight = {};
        if (side.there) {
          weight = load<T>(side.weight + at + r);
          for (int v = 0; v < kRows; ++v) {
            x[v] = T(f.split ? f.top - side.lse[at + r + v] : side.lse[at + r + v]);
          }
        }
        store(out + r, f.split ? weight * exp2<5, T>(x) : x);
      }
    };
    split(rows, i, count, f.a);
    split(columns, j, width, f.b);
  }

  // The tile of scores whose first row is row `r` of a block's rows from i on, and whose columns
  // start `c` behind j -> its share of the gradient, times the scores themselves if asked.
  template <bool kTimesScore>
  [[gnu::always_inline]] void gradient(Sums<T>& s, long i, long r, long j, long c,
                                       const Factors& f) const {
    const Vec<T> by = broadcast(scale), top = broadcast(f.top);
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      const Vec<T> b = load<T>(f.b + c + v * kRows);
#pragma GCC unroll 8
      for (int u = 0; u < kTileRows; ++u) {
        const Vec<T> dot = s[u][v];
        const T a = f.a[r + u];
        Vec<T> g = {};
        if (f.split) {
          g = exp2<kDegree, T>(dot * by - top) * (b + a);
        } else {
          if (rows.there) g += rows.weight[i + r + u] * exp2<kDegree, T>(dot * by - a);
          if (columns.there) {
            g += load<T>(columns.weight + j + c + v * kRows) * exp2<kDegree, T>(dot * by - b);
          }
        }
        s[u][v] = kTimesScore ? g * dot : g;
      }
    }
  }
};

template <class T>
[[gnu::always_inline]] inline double total(const Sums<T>& s) {
  Vec<T> all = {};
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) all += s[r][v];
  }
  return sum_of_lanes<T>(all);
}

template <class P>
double backward(const Pairs& pairs, const View& g_rows, const View& g_columns, const View& rows,
                const View& columns, const View& dq, const View& dk, bool need_scale,
                const Run& run) {
  using T = typename P::Scalar;
  constexpr long kCols = kTileCols<T>;
  const bool only_scale = !dq && !dk;
  if (only_scale && !need_scale) return 0;
  const Cut lanes(pairs.q.rows), groups(pairs.k.rows);
  const Grid grid{lanes.count, groups.count};
  const Scores<P> scores(pairs.q, pairs.k, dq && P::kPack == 1, run);
  const Gradients<P> gradients(pairs.q, pairs.k, dq, dk, scores, grid, run);
  const Backward<P> pass(pairs, g_rows, g_columns, rows, columns);
  Buffer<typename Backward<P>::Factors> factors(run.threads);
  std::vector<double> scale_sums(lanes.count, 0.0);
  sweep(grid, run, [&](long lane, long group, int thread) {
    const TileRegisters<P> held;
    auto& f = factors[thread];
    for (long i = lanes.begin(lane); i < lanes.end(lane); i += kBlock) {
      const long count = std::min(kBlock, lanes.end(lane) - i);
      for (long j0 = groups.begin(group); j0 < groups.end(group); j0 += kBlock) {
        const long width = std::min(kBlock, groups.end(group) - j0);
        pass.weigh(i, count, j0, width, f);
        for (long j = j0; j < j0 + width; j += kCols) {
          const bool some = pass.left_out.meets(i, count, j);
          const auto each = [&](long r, Sums<T>& s) __attribute__((always_inline)) {
            const long high = std::min<long>(kTileRows, count - r);
            if (only_scale) {
              pass.template gradient<true>(s, i, r, j0, j - j0, f);
            } else {
              pass.template gradient<false>(s, i, r, j0, j - j0, f);
            }
            if (some || high < kTileRows) pass.left_out.put(0, s, i + r, high, j);
            if (only_scale) {
              scale_sums[lane] += total<T>(s);
            } else {
              gradients.put(thread, r, j - j0, s);
            }
            return true;
          };
          scores.tiles(i, count, j, each, each);
        }
        gradients.add(thread, lane, i, count, j0, width);
      }
    }
  });
  const double d_scale = gradients.finish(pairs.scale, need_scale, run);
  if (!only_scale) return d_scale;
  return std::accumulate(scale_sums.begin(), scale_sums.end(), 0.0);
}

}  // namespace

void pairwise_lse_forward(const Pairs& pairs, View rows, View columns, const Run& run) {
  if (turned(pairs)) return MMFAST_LEVEL::pairwise_lse_forward(turn(pairs), columns, rows, run);
  with_arithmetic(pairs.q.type, [&](auto arithmetic) {
    forward<decltype(arithmetic)>(pairs, rows, columns, run);
  });
}

double pairwise_lse_backward(const Pairs& pairs, View g_rows, View g_columns, View rows,
                             View columns, View dq, View dk, bool need_scale, const Run& run) {
  if (turned(pairs)) {
    return MMFAST_LEVEL::pairwise_lse_backward(turn(pairs), g_columns, g_rows, columns, rows, dk,
                                               dq, need_scale, run);
  }
  return with_arithmetic(pairs.q.type, [&](auto arithmetic) {
    return backward<decltype(arithmetic)>(pairs, g_rows, g_columns, rows, columns, dq, dk,
                                          need_scale, run);
  });
}

}  // namespace mmfast::MMFAST_LEVEL

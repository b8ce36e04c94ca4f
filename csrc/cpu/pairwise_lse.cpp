// pairwise_lse: log-sum-exp of the rows and columns of S = scale * q kT, and its gradients.
//   forward   one product; S lives for one strip of 192 x kTileCols
//   backward  the strip again, G from it, then dq += G k and dk += GT q
// Scores are kept in units of log 2 (exp is 2^x). A strip takes one exponential a score, relative
// to its own maximum; where that would lose a row or a column it takes two, exactly.
#include <numeric>

#include "gradient.h"

namespace mmfast::MMFAST_LEVEL {
namespace {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
template <class T>
constexpr T kInf = std::numeric_limits<T>::infinity();
// sums below this, relative to the strip's maximum, may have lost terms to underflow
template <class T>
constexpr T kFaint = sizeof(T) == 8 ? 0x1p-500 : 0x1p-64;
// exponents that may be split into two factors: 2^(x - top) underflows only below 2^-69 (f32)
template <class T>
constexpr double kReach = sizeof(T) == 8 ? 400 : 57;

// bf16 results need no more of the exponential than their rounding shows
template <class P>
constexpr int kForwardDegree = P::kPack == 2 ? 4 : 5;
template <class P>
constexpr int kBackwardDegree = P::kPack == 2 ? 3 : 5;

// sum 2^x as sum * 2^top; x = +inf counts as top = +inf, sum = their number.
template <class T>
struct LogSums {
  Buffer<T> top, sum;
  explicit LogSums(long n) : top(n + kTileCols<T>), sum(n + kTileCols<T>) {
    std::fill_n(static_cast<T*>(top), n + kTileCols<T>, -kInf<T>);
    std::fill_n(static_cast<T*>(sum), n + kTileCols<T>, T{0});
  }

  template <int kDegree>
  void add(long i, Vec<T> top1, Vec<T> sum1) {
    const Vec<T> top0 = load<T>(top + i), best = larger<T>(top0, top1);
    // equal ones keep the factor 1, also at infinity
    const Vec<T> by0 = exp2<kDegree, T>(select<T>(top0 == best, Vec<T>{}, top0 - best));
    const Vec<T> by1 = exp2<kDegree, T>(select<T>(top1 == best, Vec<T>{}, top1 - best));
    store<T>(top + i, best);
    store<T>(sum + i, load<T>(sum + i) * by0 + sum1 * by1);
  }

  // log of the total of `copies` such sums that stand `stride` apart
  double log(long i, long copies = 1, long stride = 0) const {
    double best = top[i], total = 0;
    for (long c = 1; c < copies; ++c) best = std::max<double>(best, top[i + c * stride]);
    for (long c = 0; c < copies; ++c) {
      const double t = top[i + c * stride];
      total += sum[i + c * stride] * (t == best ? 1 : std::exp2(t - best));
    }
    return (best + std::log2(total)) * kLn2;
  }
};

// One strip of scores, `rows` x kTileCols, into the sums of its rows and columns.
template <class T, int kDegree>
struct Reduction {
  static constexpr int kVectors = kTileVectors, kRows = kWidth<T>;
  const T* s;
  long rows;
  T factor;  // scores are factor * s
  Vec<T> score(long i, int v) const { return load<T>(s + i * kTileCols<T> + v * kRows) * factor; }

  T largest() const {
    Vec<T> best[kVectors];
    for (int v = 0; v < kVectors; ++v) best[v] = broadcast(-kInf<T>);
    for (long i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) best[v] = larger<T>(score(i, v), best[v]);
    }
    for (int v = 1; v < kVectors; ++v) best[0] = larger<T>(best[v], best[0]);
    return largest_lane<T>(best[0]);
  }

  // Sums of 2^(score - top); rows come in whole vectors.
  void sum(T top, T* row_sums, Vec<T>* column_sums) const {
    Vec<T> column[kVectors] = {};
    const Vec<T> f = broadcast(factor), t = broadcast(top);
    for (long i = 0; i < rows; i += kRows) {
      Vec<T> row[kRows];
      for (int r = 0; r < kRows; ++r) {
        const T* at = s + (i + r) * kTileCols<T>;
        Vec<T> e[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          e[v] = exp2<kDegree, T>(load<T>(at + v * kRows) * f - t);
          column[v] += e[v];
        }
        row[r] = e[0];
#pragma GCC unroll 4
        for (int v = 1; v < kVectors; ++v) row[r] += e[v];
      }
      store(row_sums + i, sums_of<T>(row));
    }
    for (int v = 0; v < kVectors; ++v) column_sums[v] = column[v];
  }

  // The same with a maximum for every row and every column.
  void sum_exactly(LogSums<T>& row_state, long i0, LogSums<T>* column_state, long j0) const {
    const auto power = [](Vec<T> x, Vec<T> top) {
      return exp2<kDegree, T>(select<T>(x == top, Vec<T>{}, x - top));
    };
    // a row of -inf alone: subtract 0, so exp never sees inf - inf
    const auto base = [](Vec<T> top) { return select<T>(top == -kInf<T>, Vec<T>{}, top); };
    Vec<T> best[kVectors], column[kVectors] = {};
    for (int v = 0; v < kVectors; ++v) best[v] = broadcast(-kInf<T>);
    for (long i = 0; i < rows; i += kRows) {
      Vec<T> tops = {}, row[kRows];
      for (int r = 0; r < kRows; ++r) {
        Vec<T> top = score(i + r, 0);
        top = larger<T>(top, broadcast(-kInf<T>));
        for (int v = 0; v < kVectors; ++v) {
          top = larger<T>(score(i + r, v), top);
          best[v] = larger<T>(score(i + r, v), best[v]);
        }
        tops[r] = largest_lane<T>(top);
        row[r] = Vec<T>{};
        for (int v = 0; v < kVectors; ++v) {
          row[r] += power(score(i + r, v), base(broadcast<T>(tops[r])));
        }
      }
      row_state.template add<kDegree>(i0 + i, tops, sums_of<T>(row));
    }
    if (!column_state) return;
    for (long i = 0; i < rows; ++i) {
      for (int v = 0; v < kVectors; ++v) column[v] += power(score(i, v), base(best[v]));
    }
    for (int v = 0; v < kVectors; ++v) {
      column_state->template add<kDegree>(j0 + v * kRows, best[v], column[v]);
    }
  }
};

template <class P>
void forward(const Pairs& pairs, const View& rows, const View& columns, const Run& run) {
  using T = typename P::Scalar;
  constexpr long kCols = kTileCols<T>, kRows = kWidth<T>;
  constexpr int kDegree = kForwardDegree<P>;
  const long N = pairs.q.rows, M = pairs.k.rows;
  const Cut lanes(N), groups(M);
  const Grid grid{lanes.count, groups.count};
  const Scores<P> scores(pairs.q, pairs.k, false, run);
  const LeftOut<T> left_out(pairs);
  const T scale = T(pairs.scale * kLog2e);

  const long padded_M = round_up(M, kCols);
  LogSums<T> row_state(N), column_state(columns ? grid.teams() * padded_M : 0);
  const long strip_size = (kBlock + kTileRows) * kCols;
  Buffer<T> strips(run.threads * strip_size);
  sweep(grid, run, [&](long lane, long group, int thread) {
    T* strip = strips + thread * strip_size;
    const long team = lane / grid.groups;
    for (long i = lanes.begin(lane); i < lanes.end(lane); i += kBlock) {
      const long count = std::min(kBlock, lanes.end(lane) - i), whole = round_up(count, kRows);
      for (long j = groups.begin(group); j < groups.end(group); j += kCols) {
        scores.strip(i, count, j, {strip, kCols});
        Reduction<T, kDegree> reduction{strip, whole, scale};
        if (whole != count || left_out.meets(i, count, j)) {
          for (T* s = strip; s < strip + count * kCols; ++s) *s *= scale;
          left_out.put(-kInf<T>, {strip, kCols}, i, count, j);
          std::fill(strip + count * kCols, strip + whole * kCols, -kInf<T>);
          reduction.factor = 1;
        }
        const T top = reduction.largest();
        T row_sums[kBlock];
        Vec<T> column_sums[kTileVectors];
        bool sure = std::isfinite(top);
        if (sure) {
          reduction.sum(top, row_sums, column_sums);
          for (long r = 0; r < count; ++r) sure &= row_sums[r] >= kFaint<T>;
          for (long c = 0; columns && c < std::min(kCols, M - j); ++c) {
            sure &= column_sums[c / kRows][c % kRows] >= kFaint<T>;
          }
        }
        const long column = team * padded_M + j;
        if (!sure) {
          reduction.sum_exactly(row_state, i, columns ? &column_state : nullptr, column);
          continue;
        }
        for (long r = 0; r < whole; r += kRows) {
          row_state.template add<kDegree>(i + r, broadcast(top), load<T>(row_sums + r));
        }
        for (int v = 0; columns && v < kTileVectors; ++v) {
          column_state.template add<kDegree>(column + v * kRows, broadcast(top), column_sums[v]);
        }
      }
    }
  });

  const auto write = [&](const View& out, const LogSums<T>& state, long copies) {
    if (!out) return;
    Scores<P>::for_each_chunk(out.rows, run, [&](long begin, long end, int) {
      for (long i = begin; i < end; ++i) out.at<T>(i) = T(state.log(i, copies, padded_M));
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

  // Scores of a strip -> their share of the gradient, in place; times the score itself for that of
  // the scale alone.
  template <bool kTimesScore>
  void gradient(Matrix<T> s, long i, long count, long j, long in_block, const Factors& f) const {
    const T *a = f.a, *b = f.b + in_block;
    const bool has_rows = rows.there, has_columns = columns.there;
    const Vec<T> by = broadcast(scale), top = broadcast(f.top);
    for (long r = 0; r < count; ++r) {
      T* at = s.data + r * s.stride;
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const Vec<T> dot = load<T>(at + v * kRows), x = dot * by, bv = load<T>(b + v * kRows);
        Vec<T> g = {};
        if (f.split) {
          g = exp2<kDegree, T>(dot * by - top) * (bv + a[r]);
        } else {
          if (has_rows) g += rows.weight[i + r] * exp2<kDegree, T>(x - a[r]);
          if (has_columns) {
            g += load<T>(columns.weight + j + v * kRows) * exp2<kDegree, T>(x - bv);
          }
        }
        store(at + v * kRows, kTimesScore ? g * dot : g);
      }
    }
    if (left_out.meets(i, count, j)) left_out.put(0, s, i, count, j);
  }
};

template <class T>
double total(Matrix<T> strip, long rows) {
  double sum = 0;
  for (long r = 0; r < rows; ++r) {
    for (long c = 0; c < kTileCols<T>; ++c) sum += strip.at(r, c).data[0];
  }
  return sum;
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
    auto& f = factors[thread];
    for (long i = lanes.begin(lane); i < lanes.end(lane); i += kBlock) {
      const long count = std::min(kBlock, lanes.end(lane) - i);
      for (long j0 = groups.begin(group); j0 < groups.end(group); j0 += kBlock) {
        const long width = std::min(kBlock, groups.end(group) - j0);
        pass.weigh(i, count, j0, width, f);
        for (long j = j0; j < j0 + width; j += kCols) {
          const Matrix<T> strip = gradients.strip(thread, j - j0);
          scores.strip(i, count, j, strip);
          if (only_scale) {
            pass.template gradient<true>(strip, i, count, j, j - j0, f);
            scale_sums[lane] += total(strip, count);
          } else {
            pass.template gradient<false>(strip, i, count, j, j - j0, f);
            gradients.keep(thread, count, j - j0);
          }
        }
        gradients.add(thread, lane, i, count, j0, width);
      }
    }
  });
  const double d_scale = gradients.finish(pairs.scale, need_scale, run);
  if (!only_scale) return d_scale;
  return std::accumulate(scale_sums.begin(), scale_sums.end(), 0.0);
}

// Lanes lie along the longer side.
bool turned(const Pairs& pairs) { return pairs.q.rows < pairs.k.rows; }
Pairs turn(const Pairs& p) {
  return {p.k, p.q, p.scale, p.k_ids, p.q_ids, p.mask ? p.mask.transposed() : p.mask};
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

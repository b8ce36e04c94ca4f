// pairwise_softplus: the sum of softplus(scale * <q_i, k_j> + bias) over all pairs, and its
// gradients from the same visit. The sum is one number, so G = softplus' needs no upstream
// gradient: a tile of scores becomes G in the registers it was summed in, then dq += G k and dk +=
// GT q (gradient.h). Three products; one where neither dq nor dk is asked for.
#include "gradient.h"

namespace mmfast::MMFAST_LEVEL {
namespace {

// Scores in units of log 2 (exp is 2^x), those of pairs left out -inf: softplus and slope are 0.
template <class P>
struct Epilogue {
  using T = typename P::Scalar;
  const LeftOut<T> left_out;
  const T scale, bias;

  Epilogue(const Pairs& pairs, double b)
      : left_out(pairs), scale(T(pairs.scale * kLog2e)), bias(T(b * kLog2e)) {}

  // A tile of products, of which `rows` rows from i on are there, becomes one of scores.
  [[gnu::always_inline]] void score(Sums<T>& s, long i, long rows, long j, bool some) const {
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) s[r][v] = s[r][v] * scale + bias;
    }
    if (some || rows < kTileRows) left_out.put(-kInf<T>, s, i, rows, j);
  }

  // Adds up softplus over a tile of scores, and its slopes, which take the scores' place.
  template <bool kSlopes>
  [[gnu::always_inline]] static void add(Sums<T>& s, SoftplusSum& sum) {
    Softplus2<T> columns[kTileVectors];
    Vec<T> slopes = {};
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const Vec<T> slope = columns[v].add(s[r][v]);
        if (kSlopes) slopes += slope, s[r][v] = slope;
      }
    }
#pragma GCC unroll 4
    for (int v = 1; v < kTileVectors; ++v) columns[0].add(columns[v]);
    sum.value += sum_of_lanes<T>(columns[0].value());
    if (kSlopes) sum.d_bias += sum_of_lanes<T>(slopes);
  }

  // sum G_ij <q_i, k_j> of a tile; a pair left out counts nothing, be its product infinite.
  [[gnu::always_inline]] static double inner(const Sums<T>& slopes, const Sums<T>& dots) {
    Vec<T> sum = {};
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        sum += select<T>(slopes[r][v] == 0, Vec<T>{}, slopes[r][v] * dots[r][v]);
      }
    }
    return sum_of_lanes<T>(sum);
  }
};

template <class P>
SoftplusSum softplus(const Pairs& pairs, double bias, const View& dq, const View& dk,
                     bool need_scale, bool need_bias, const Run& run) {
  using T = typename P::Scalar;
  constexpr long kCols = kTileCols<T>;
  const bool sides = dq || dk, only_scale = need_scale && !sides;
  const bool slopes = sides || need_scale || need_bias;
  const Cut lanes(pairs.q.rows), groups(pairs.k.rows);
  const Grid grid{lanes.count, groups.count};
  const Scores<P> scores(pairs.q, pairs.k, dq && P::kPack == 1, run);
  const Gradients<P> gradients(pairs.q, pairs.k, dq, dk, scores, grid, run);
  const Epilogue<P> pass(pairs, bias);
  std::vector<SoftplusSum> lane_sums(lanes.count);
  sweep(grid, run, [&](long lane, long group, int thread) {
    const TileRegisters<P> held;
    SoftplusSum sum;
    for (long i = lanes.begin(lane); i < lanes.end(lane); i += kBlock) {
      const long count = std::min(kBlock, lanes.end(lane) - i);
      for (long j0 = groups.begin(group); j0 < groups.end(group); j0 += kBlock) {
        const long width = std::min(kBlock, groups.end(group) - j0);
        for (long j = j0; j < j0 + width; j += kCols) {
          const bool some = pass.left_out.meets(i, count, j);
          const auto each = [&](long r, Sums<T>& s) __attribute__((always_inline)) {
            const long rows = std::min<long>(kTileRows, count - r);
            if (only_scale) {
              Sums<T> dots;
#pragma GCC unroll 8
              for (int u = 0; u < kTileRows; ++u) {
#pragma GCC unroll 4
                for (int v = 0; v < kTileVectors; ++v) dots[u][v] = s[u][v];
              }
              pass.score(s, i + r, rows, j, some);
              pass.template add<true>(s, sum);
              sum.d_scale += pass.inner(s, dots);
            } else if (slopes) {
              pass.score(s, i + r, rows, j, some);
              pass.template add<true>(s, sum);
              if (sides) gradients.put(thread, r, j - j0, s);
            } else {
              pass.score(s, i + r, rows, j, some);
              pass.template add<false>(s, sum);
            }
            return true;
          };
          scores.tiles(i, count, j, each, each);
        }
        gradients.add(thread, lane, i, count, j0, width);
      }
    }
    lane_sums[lane].value += sum.value;
    lane_sums[lane].d_scale += sum.d_scale;
    lane_sums[lane].d_bias += sum.d_bias;
  });
  SoftplusSum total;
  total.d_scale = gradients.finish(pairs.scale, need_scale, run);
  for (const SoftplusSum& sum : lane_sums) {
    total.value += sum.value * kLn2;
    total.d_scale += sum.d_scale;
    if (need_bias) total.d_bias += sum.d_bias;
  }
  return total;
}

}  // namespace

SoftplusSum pairwise_softplus(const Pairs& pairs, double bias, View dq, View dk, bool need_scale,
                              bool need_bias, const Run& run) {
  if (turned(pairs)) {
    return MMFAST_LEVEL::pairwise_softplus(turn(pairs), bias, dk, dq, need_scale, need_bias, run);
  }
  return with_arithmetic(pairs.q.type, [&](auto arithmetic) {
    return softplus<decltype(arithmetic)>(pairs, bias, dq, dk, need_scale, need_bias, run);
  });
}

}  // namespace mmfast::MMFAST_LEVEL

// pairwise_lse of rows with what their gradient is made of, the mean of k under the softmax of each
// row, from one visit: two products, S and G k, where forward and backward take three.
//
// As the forward pass of flash attention (Dao et al. 2022): each row of q has a reference, powers
// 2^(s - reference) are summed and multiplied with k as they come, and the total divides at the
// end. A reference is raised only when a sum leaves its range, which most calls never see.
#include "gradient.h"
#include "log_sums.h"

namespace mmfast::MMFAST_LEVEL {
namespace {

// A sum of a strip above this raises the reference. Few ever do, and it leaves as much of the range
// for k. Below the reference scores may lie as far as their type reaches.
template <class T>
constexpr T kLoudest = sizeof(T) == 8 ? 0x1p512 : 0x1p64;

// Lanes lie along the keys and rows of q are the columns of the sweep, whichever are more: a strip
// has its references in a few vectors. Several teams of lanes keep a state each.
template <class P>
struct Epilogue {
  using T = typename P::Scalar;
  static constexpr long kRows = kWidth<T>, kCols = kTileCols<T>;
  static constexpr int kDegree = kForwardDegree<P>;

  const Scores<P>& scores;
  const Gradients<P>& sums_of_k;
  const LeftOut<T> left_out;
  const T factor;
  const long stride;  // of states of neighbouring teams
  LogSums<T> state;   // `top` is the reference

  Epilogue(const Pairs& pairs, const Scores<P>& s, const Gradients<P>& g, long teams)
      : scores(s),
        sums_of_k(g),
        left_out(pairs),
        factor(T(pairs.scale * kLog2e)),
        stride(round_up(pairs.k.rows, kCols)),
        state(teams * stride) {
    // finite, so that a score of -inf stays -inf below it
    std::fill_n(static_cast<T*>(state.top), teams * stride, std::numeric_limits<T>::lowest());
  }

  // A strip of scores in stored form, of which both passes over it are made.
  struct Stored {
    alignas(kVectorBytes) T data[kBlock * kCols];
  };

  // Puts the powers of `count` keys from i on and kCols rows of q from j on, whose state is at
  // `at`, and adds them up. `c` is where they stand in the block.
  void visit(int thread, long lane, long i, long count, long j, long c, long at,
             Stored& stored) const {
    const bool seen = state.top[at] > std::numeric_limits<T>::lowest();
    if (seen && visit_fast(thread, i, count, j, c, at)) return;
    store_scores(i, count, j, stored);
    raise(lane, count, j, at, stored);
    visit_stored(thread, count, c, at, stored);
  }

 private:
  // False if the references are too low.
  bool visit_fast(int thread, long i, long count, long j, long c, long at) const {
    const bool some = left_out.meets(i, count, j);
    Vec<T> sums[kTileVectors] = {};
    const T* top = state.top + at;
    const auto each = [&](long r, Sums<T>& s) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const Vec<T> t = load<T>(top + v * kRows);
#pragma GCC unroll 8
        for (int u = 0; u < kTileRows; ++u) s[u][v] = s[u][v] * factor - t;
      }
      const long high = std::min<long>(kTileRows, count - r);
      if (some || high < kTileRows) left_out.put(-kInf<T>, s, i + r, high, j);
      add_powers(s, sums);
      sums_of_k.put(thread, r, c, s);
      return true;
    };
    scores.tiles(i, count, j, each, each);
    Ints<T> good = Ints<T>{} - 1;
    for (int v = 0; v < kTileVectors; ++v) good &= sums[v] <= broadcast(kLoudest<T>);
    if (!all<T>(good)) return false;
    add_sums(at, sums);
    return true;
  }

  void store_scores(long i, long count, long j, Stored& stored) const {
    const Matrix<T> s{stored.data, kCols};
    scores.strip(i, count, j, s);
    for (T* x = s.data; x < s.data + count * kCols; ++x) *x *= factor;
    if (left_out.meets(i, count, j)) left_out.put(-kInf<T>, s, i, count, j);
    std::fill(s.at(count, 0).data, s.at(round_up(count, kTileRows), 0).data, -kInf<T>);
  }

  // References that the strip exceeds rise above it, and what was summed falls as much.
  void raise(long lane, long count, long j, long at, const Stored& stored) const {
    for (int v = 0; v < kTileVectors; ++v) {
      Vec<T> best = broadcast(-kInf<T>);
      for (long r = 0; r < count; ++r) {
        best = larger<T>(load<T>(stored.data + r * kCols + v * kRows), best);
      }
      for (long l = v * kRows; l < (v + 1) * kRows; ++l) {
        T &top = state.top[at + l], &sum = state.sum[at + l];
        if (!(best[l % kRows] > top)) continue;
        // a whole number, so that the fall is a power of two: it rounds nothing
        const T raised = std::ceil(best[l % kRows]), fall = std::exp2(top - raised);
        top = raised;
        if (sum == 0) continue;
        sum *= fall;
        sums_of_k.scale_k(lane, j + l, fall);
      }
    }
  }

  void visit_stored(int thread, long count, long c, long at, const Stored& stored) const {
    Vec<T> sums[kTileVectors] = {};
    for (long r = 0; r < count; r += kTileRows) {
      Sums<T> s;
      for (int u = 0; u < kTileRows; ++u) {
        for (int v = 0; v < kTileVectors; ++v) {
          const Vec<T> x = load<T>(stored.data + (r + u) * kCols + v * kRows);
          const Vec<T> top = load<T>(state.top + at + v * kRows);
          // equal ones count as 1, also at infinity
          s[u][v] = select<T>(x == top, Vec<T>{}, x - top);
        }
      }
      add_powers(s, sums);
      sums_of_k.put(thread, r, c, s);
    }
    add_sums(at, sums);
  }

  // Exponents become powers.
  [[gnu::always_inline]] static void add_powers(Sums<T>& s, Vec<T>* sums) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      Vec<T> sum = {};
#pragma GCC unroll 8
      for (int u = 0; u < kTileRows; ++u) {
        s[u][v] = exp2<kDegree, T>(s[u][v]);
        sum += s[u][v];
      }
      sums[v] += sum;
    }
  }

  void add_sums(long at, const Vec<T>* sums) const {
    for (int v = 0; v < kTileVectors; ++v) {
      T* to = state.sum + at + v * kRows;
      store(to, load<T>(to) + sums[v]);
    }
  }
};

// As few groups as blocks can hold: lanes of keys keep threads busy, and products are deeper.
inline Cut wide_groups(long n) {
  const Cut usual(n);
  const long blocks = (n + kBlock - 1) / kBlock;
  return usual.width > kBlock ? usual : Cut(n, round_up((n + blocks - 1) / blocks, 64));
}

template <class P>
void lse_mean(const Pairs& pairs, const View& rows, const View& mean, const Run& run) {
  using T = typename P::Scalar;
  constexpr long kCols = kTileCols<T>;
  const long M = pairs.q.rows, N = pairs.k.rows;
  // where rows of q are more, they alone keep threads busy, and each group meets all keys at once
  const bool by_groups = N > M;
  const Cut keys = by_groups ? Cut(M, M) : Cut(M);
  const Cut groups = by_groups ? Cut(N, std::min(Cut(N).width, kBlock)) : wide_groups(N);
  const Grid grid{keys.count, groups.count};
  const Scores<P> scores(pairs.q, pairs.k, false, run);
  const Gradients<P> sums_of_k(pairs.q, pairs.k, {}, mean, scores, grid, run);
  const Epilogue<P> pass(pairs, scores, sums_of_k, grid.teams());
  Buffer<typename Epilogue<P>::Stored> stored(run.threads);
  const auto visit = [&](long lane, long group, int thread) {
    const TileRegisters<P> held;
    const long team = lane / grid.groups * pass.stride;
    for (long j0 = groups.begin(group); j0 < groups.end(group); j0 += kBlock) {
      const long width = std::min(kBlock, groups.end(group) - j0);
      for (long i = keys.begin(lane); i < keys.end(lane); i += kBlock) {
        const long count = std::min(kBlock, keys.end(lane) - i);
        for (long j = j0; j < j0 + width; j += kCols) {
          pass.visit(thread, lane, i, count, j, j - j0, team + j, stored[thread]);
        }
        sums_of_k.add(thread, lane, i, count, j0, width);
      }
    }
  };
  if (by_groups) {
    for_each(groups.count, run, [&](long group, int thread) { visit(0, group, thread); });
  } else {
    sweep(grid, run, visit);
  }

  Scores<P>::for_each_chunk(N, run, [&](long begin, long end, int) {
    for (long j = begin; j < end; ++j) {
      const auto total = pass.state.total(j, grid.teams(), pass.stride);
      rows.at<T>(j) = T(total.log());
      for (long team = 0; team < grid.teams(); ++team) {
        // an empty row has the mean 0, one of infinite scores none
        const double above = pass.state.top[team * pass.stride + j] - total.top;
        const double share = total.sum == 0 ? 0 : std::exp2(above) / total.sum;
        sums_of_k.scale_k(team * grid.groups, j, T(share));
      }
    }
  });
  sums_of_k.finish(1, false, run);
}

}  // namespace

void pairwise_lse_mean(const Pairs& pairs, View rows, View mean, const Run& run) {
  const Pairs turned = turn(pairs);
  with_arithmetic(pairs.q.type, [&](auto arithmetic) {
    lse_mean<decltype(arithmetic)>(turned, rows, mean, run);
  });
}

}  // namespace mmfast::MMFAST_LEVEL

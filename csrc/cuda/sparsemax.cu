// sparsemax: one pass over memory for rows of up to 16384 entries, 8192 in f64. Such a row stays in
// the registers of its threads while Newton's steps look for its threshold; a longer one is read
// again, from the caches. f32, bf16, f16 in -> f32 weights, f64 sums; f64 all through.
#include <limits>

#include "../sparsemax.h"
#include "row.h"

namespace mmfast::cuda {
namespace {

using sparsemax::Newton;
using sparsemax::Threshold;

// blocks that must fit on a multiprocessor: a block of 1024 threads leaves 64 registers to each
template <class P>
constexpr int kFit = P::kBlock > kThreads ? 1 : kBlocks;

// What a weight of the support is at least, so that rounding never takes an entry out of it.
template <class T>
constexpr Wide<T> kLeast = std::is_same_v<T, __half> ? Wide<T>(5.9604644775390625e-08)
                                                     : std::numeric_limits<Wide<T>>::min();

// body(entry) for the entries of this thread
template <class P, class Body>
__device__ void each_entry(const Operand<P>& x, long packs, Body body) {
  P::each_pack(packs, [&](long pack, int turn) {
    const auto entries = x.at(pack, turn);
#pragma unroll
    for (int e = 0; e < P::kPack; ++e) body(widen(entries.x[e]));
  });
}

template <class P, class W = typename P::W>
__device__ Threshold<W> find_threshold(const Operand<P>& x, long packs) {
  W largest[1] = {W(-INFINITY)};
  each_entry(x, packs, [&](W v) { largest[0] = v > largest[0] ? v : largest[0]; });
  combine_over_row<P>(largest, [](W a, W b) { return a > b ? a : b; });
  const W shift = sparsemax::shift_of(largest[0]);
  Newton newton;
  for (;;) {
    double sums[2] = {};
    W lowest[1] = {W(INFINITY)};
    each_entry(x, packs, [&](W v) {
      // rounding takes no difference past -1; f64 is slow on many cards, and few entries get there
      if (v - shift < -1) return;
      const double z = double(v) - shift;
      if (z <= newton.tau) return;
      sums[0] += z;
      sums[1] += 1;
      lowest[0] = v < lowest[0] ? v : lowest[0];
    });
    add_over_row<P>(sums);
    combine_over_row<P>(lowest, [](W a, W b) { return a < b ? a : b; });
    if (newton.ends(sums[0], sums[1], double(lowest[0]) - shift)) return {newton, shift, lowest[0]};
  }
}

template <class P, class T = typename P::T, class W = typename P::W>
__global__ void __launch_bounds__(P::kBlock, kFit<P>)
    sparsemax_forward_rows(Matrix<const T> x_, Matrix<T> out_, long rows, long cols) {
  const long packs = cols / P::kPack;
  P::each_row(rows, [&](long i) {
    const Operand<P> x(x_.row(i), packs);
    const Threshold<W> t = find_threshold(x, packs);
    auto* out = reinterpret_cast<typename P::Packed*>(out_.row(i));
    P::each_pack(packs, [&](long pack, int turn) {
      const auto entries = x.at(pack, turn);
      typename P::Packed made;
#pragma unroll
      for (int e = 0; e < P::kPack; ++e) {
        const W v = widen(entries.x[e]), p = v - t.high - t.low;
        made.x[e] = narrow<T>(v >= t.lowest ? (p > kLeast<T> ? p : kLeast<T>) : t.rest);
      }
      out[pack] = made;
    });
  });
}

template <class P, class T = typename P::T, class W = typename P::W>
__global__ void __launch_bounds__(P::kBlock, kFit<P>)
    sparsemax_backward_rows(Matrix<const T> g_, Matrix<const T> p_, Matrix<T> dx_, long rows,
                            long cols) {
  const long packs = cols / P::kPack;
  P::each_row(rows, [&](long i) {
    const Operand<P> g(g_.row(i), packs), p(p_.row(i), packs);
    double sums[2] = {};
    P::each_pack(packs, [&](long pack, int turn) {
      const auto up = g.at(pack, turn), weights = p.at(pack, turn);
#pragma unroll
      for (int e = 0; e < P::kPack; ++e) {
        if (!(widen(weights.x[e]) > 0)) continue;
        sums[0] += widen(up.x[e]);
        sums[1] += 1;
      }
    });
    add_over_row<P>(sums);
    const W mean = W(sums[0] / sums[1]);
    auto* dx = reinterpret_cast<typename P::Packed*>(dx_.row(i));
    P::each_pack(packs, [&](long pack, int turn) {
      const auto up = g.at(pack, turn), weights = p.at(pack, turn);
      typename P::Packed made;
#pragma unroll
      for (int e = 0; e < P::kPack; ++e) {
        // outside of the support the weight itself: 0, or the NaN of its row
        const W w = widen(weights.x[e]);
        made.x[e] = narrow<T>(w > 0 ? widen(up.x[e]) - mean : w);
      }
      dx[pack] = made;
    });
  });
}

// body(plan) with the plan for rows of `cols` elements. With more than two packs of half types the
// backward of 1024 threads would spill.
template <class T, class Body>
void with_row_plan(long cols, bool packed, Body body) {
  constexpr int kPack = 16 / sizeof(T), kMost = 1024, kHeld = sizeof(T) == 2 ? 2 : 4;
  const long packs = cols / kPack;
  if (!packed) return cols <= kMost ? body(Plan<T, 1, 32, 0>{}) : body(Plan<T, 1, kMost, 0>{});
  if (packs <= kHeld * 32) return body(Plan<T, kPack, 32, kHeld>{});
  if (packs <= kHeld * kThreads) return body(Plan<T, kPack, kThreads, kHeld>{});
  if (packs <= kHeld * kMost) return body(Plan<T, kPack, kMost, kHeld>{});
  return body(Plan<T, kPack, kMost, 0>{});
}
template <class Body>
void with_row_plan(Type type, long cols, bool packed, Body body) {
  if (type == Type::f32) return with_row_plan<float>(cols, packed, body);
  if (type == Type::f64) return with_row_plan<double>(cols, packed, body);
  if (type == Type::bf16) return with_row_plan<__nv_bfloat16>(cols, packed, body);
  return with_row_plan<__half>(cols, packed, body);
}

}  // namespace

void sparsemax_forward(View x, View out, Queue queue) {
  if (x.rows == 0) return;
  const Call call{"sparsemax", x.rows, x.cols, x.type, queue};
  const OnDevice device(call);
  const bool packed = in_packs(x, x.cols) && in_packs(out, x.cols);
  with_row_plan(x.type, x.cols, packed, [&](auto plan) {
    using P = decltype(plan);
    using T = typename P::T;
    launch(sparsemax_forward_rows<P>, blocks_for<P>(x.rows, device), P::kBlock, call,
           Matrix<const T>(x), Matrix<T>(out), x.rows, x.cols);
  });
}

void sparsemax_backward(View g, View p, View dx, Queue queue) {
  if (p.rows == 0) return;
  const Call call{"sparsemax backward", p.rows, p.cols, p.type, queue};
  const OnDevice device(call);
  const bool packed = in_packs(g, p.cols) && in_packs(p, p.cols) && in_packs(dx, p.cols);
  with_row_plan(p.type, p.cols, packed, [&](auto plan) {
    using P = decltype(plan);
    using T = typename P::T;
    launch(sparsemax_backward_rows<P>, blocks_for<P>(p.rows, device), P::kBlock, call,
           Matrix<const T>(g), Matrix<const T>(p), Matrix<T>(dx), p.rows, p.cols);
  });
}

}  // namespace mmfast::cuda

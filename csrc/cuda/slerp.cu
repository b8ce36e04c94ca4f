// slerp: one pass over memory. A row waits in registers until its dot product, and with it the
// weights, are known. f32, bf16, f16 in -> f32 sums and weights -> input type; f64 all through.
#include "../slerp.h"
#include "row.h"

namespace mmfast::cuda {
namespace {

template <class P, class T = typename P::T, class W = typename P::W>
__global__ void __launch_bounds__(kThreads, kBlocks)
    slerp_forward_rows(Matrix<const T> a_, Matrix<const T> b_, Matrix<const W> lam_, Matrix<T> out_,
                       long rows, long cols) {
  const long packs = cols / P::kPack;
  P::each_row(rows, [&](long i) {
    const Operand<P> a(a_.row(i), packs), b(b_.row(i), packs);
    const W lam = *lam_.row(i);
    W dot[1] = {};
    P::each_pack(packs, [&](long pack, int turn) {
      const auto x = a.at(pack, turn), y = b.at(pack, turn);
#pragma unroll
      for (int e = 0; e < P::kPack; ++e) dot[0] += widen(x.x[e]) * widen(y.x[e]);
    });
    add_over_row<P>(dot);
    const slerp::Angle<slerp::Scalar<W>> angle(dot[0]);
    const W k1 = angle.weight(lam), k2 = angle.weight(1 - lam);
    auto* out = reinterpret_cast<typename P::Packed*>(out_.row(i));
    P::each_pack(packs, [&](long pack, int turn) {
      const auto x = a.at(pack, turn), y = b.at(pack, turn);
      typename P::Packed m;
#pragma unroll
      for (int e = 0; e < P::kPack; ++e) {
        m.x[e] = narrow<T>(k1 * widen(x.x[e]) + k2 * widen(y.x[e]));
      }
      out[pack] = m;
    });
  });
}

// into = weight g + g_c other
template <class P, class W = typename P::W>
__device__ void write_gradient(typename P::T* into, W weight, const Operand<P>& g_, W g_c,
                               const Operand<P>& other_, long packs) {
  P::each_pack(packs, [&](long pack, int turn) {
    const auto g = g_.at(pack, turn), other = other_.at(pack, turn);
    typename P::Packed d;
#pragma unroll
    for (int e = 0; e < P::kPack; ++e) {
      d.x[e] = narrow<typename P::T>(weight * widen(g.x[e]) + g_c * widen(other.x[e]));
    }
    reinterpret_cast<typename P::Packed*>(into)[pack] = d;
  });
}

template <class P, class T = typename P::T, class W = typename P::W>
__global__ void __launch_bounds__(kThreads, kBlocks)
    slerp_backward_rows(Matrix<const T> g_, Matrix<const T> a_, Matrix<const T> b_,
                        Matrix<const W> lam_, Matrix<T> da, Matrix<T> db, Matrix<W> dlam, long rows,
                        long cols) {
  const long packs = cols / P::kPack;
  P::each_row(rows, [&](long i) {
    const Operand<P> g(g_.row(i), packs), a(a_.row(i), packs), b(b_.row(i), packs);
    const W lam = *lam_.row(i);
    W sums[3] = {};
    P::each_pack(packs, [&](long pack, int turn) {
      const auto u = g.at(pack, turn), x = a.at(pack, turn), y = b.at(pack, turn);
#pragma unroll
      for (int e = 0; e < P::kPack; ++e) {
        sums[0] += widen(x.x[e]) * widen(y.x[e]);
        sums[1] += widen(u.x[e]) * widen(x.x[e]);
        sums[2] += widen(u.x[e]) * widen(y.x[e]);
      }
    });
    add_over_row<P>(sums);
    const auto [dot, g_a, g_b] = sums;
    const slerp::Angle<slerp::Scalar<W>> angle(dot);
    if (dlam.data && threadIdx.x % P::kLanes == 0) {
      *dlam.row(i) = g_a * angle.weight_by_lam(lam) - g_b * angle.weight_by_lam(1 - lam);
    }
    if (!da.data && !db.data) return;
    const W g_c = g_a * angle.weight_by_c(lam) + g_b * angle.weight_by_c(1 - lam);
    if (da.data) write_gradient<P, W>(da.row(i), angle.weight(lam), g, g_c, b, packs);
    if (db.data) write_gradient<P, W>(db.row(i), angle.weight(1 - lam), g, g_c, a, packs);
  });
}

}  // namespace

void slerp_forward(View a, View b, View lam, View out, Queue queue) {
  if (a.rows == 0) return;
  const Call call{"slerp", a.rows, a.cols, a.type, queue};
  const OnDevice device(call);
  const bool packed = in_packs(a, a.cols) && in_packs(b, a.cols) && in_packs(out, a.cols);
  with_plan(a.type, a.cols, packed, [&](auto plan) {
    using P = decltype(plan);
    using T = typename P::T;
    launch(slerp_forward_rows<P>, blocks_for<P>(a.rows, device), kThreads, call, Matrix<const T>(a),
           Matrix<const T>(b), Matrix<const Wide<T>>(lam), Matrix<T>(out), a.rows, a.cols);
  });
}

void slerp_backward(View g, View a, View b, View lam, View da, View db, View dlam, Queue queue) {
  if (a.rows == 0 || !(da || db || dlam)) return;
  const Call call{"slerp backward", a.rows, a.cols, a.type, queue};
  const OnDevice device(call);
  const bool packed = in_packs(g, a.cols) && in_packs(a, a.cols) && in_packs(b, a.cols) &&
                      in_packs(da, a.cols) && in_packs(db, a.cols);
  with_plan(a.type, a.cols, packed, [&](auto plan) {
    using P = decltype(plan);
    using T = typename P::T;
    launch(slerp_backward_rows<P>, blocks_for<P>(a.rows, device), kThreads, call,
           Matrix<const T>(g), Matrix<const T>(a), Matrix<const T>(b), Matrix<const Wide<T>>(lam),
           Matrix<T>(da), Matrix<T>(db), Matrix<Wide<T>>(dlam), a.rows, a.cols);
  });
}

}  // namespace mmfast::cuda

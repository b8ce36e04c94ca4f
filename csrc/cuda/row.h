#pragma once
#include <type_traits>

#include "launch.h"

// Kernels that take a row at a time: who reads what of it, and the sums over it.
namespace mmfast::cuda {

constexpr int kThreads = 128;  // of a block, unless a row takes more
// blocks that must fit on a multiprocessor: 168 registers a thread are left, with which none spill
constexpr int kBlocks = 3;

// what is computed in: f64 for f64, else f32
template <class T>
using Wide = std::conditional_t<sizeof(T) == 8, double, float>;

template <class T>
__device__ inline Wide<T> widen(T x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __half2float(x);
  } else {
    return x;
  }
}
template <class T>
__device__ inline T narrow(Wide<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half(x);
  } else {
    return x;
  }
}

// Elements that travel together: 16 bytes, or one element where the addresses do not allow it.
template <class T, int kSize>
struct alignas(kSize * sizeof(T)) Pack {
  T x[kSize];
};

// A matrix as a kernel is given it; `data` is null where nothing is asked for.
template <class T>
struct Matrix {
  T* data;
  long stride;

  explicit Matrix(const View& x) : data(static_cast<T*>(x.data)), stride(x.row_stride) {}
  __device__ T* row(long i) const { return data + i * stride; }
};

// How a row is spread over threads: kLanes of them take its packs in turn. A thread holds the
// first kHeld it meets in registers, which must be all; kHeld = 0 holds none and reads them twice.
template <class T_, int kPack_, int kLanes_, int kHeld_>
struct Plan {
  using T = T_;
  using W = Wide<T>;
  using Packed = Pack<T, kPack_>;
  static constexpr int kPack = kPack_, kLanes = kLanes_, kHeld = kHeld_;
  static constexpr int kBlock = kLanes < kThreads ? kThreads : kLanes;  // threads of a block
  static constexpr int kRows = kBlock / kLanes;                         // of a block, at a time
  static_assert(kLanes == 32 || kLanes == kBlock);

  // body(i) for the rows of this thread. All threads of a row make the same turns.
  template <class Body>
  static __device__ void each_row(long rows, Body body) {
    const long step = long(gridDim.x) * kRows;
    for (long i = long(blockIdx.x) * kRows + threadIdx.x / kLanes; i < rows; i += step) body(i);
  }

  // body(pack, turn) for the packs of this thread.
  template <class Body>
  static __device__ void each_pack(long packs, Body body) {
    const long lane = threadIdx.x % kLanes;
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int turn = 0; turn < kHeld; ++turn) {
        const long pack = lane + turn * kLanes;
        if (pack < packs) body(pack, turn);
      }
    } else {
      for (long pack = lane; pack < packs; pack += kLanes) body(pack, 0);
    }
  }
};

// A row on its way in.
template <class P>
class Operand {
 public:
  using Packed = typename P::Packed;

  __device__ Operand(const typename P::T* row, long packs)
      : row_(reinterpret_cast<const Packed*>(row)) {
    // without conditions in between, all of it is in flight at once
    if constexpr (P::kHeld > 0) {
      P::each_pack(packs, [&](long pack, int turn) { held_[turn] = row_[pack]; });
    }
  }
  __device__ Packed at(long pack, int turn) const {
    if constexpr (P::kHeld > 0) return held_[turn];
    return row_[pack];
  }

 private:
  const Packed* row_;
  Packed held_[P::kHeld > 0 ? P::kHeld : 1];
};

// Each of `values` becomes what `op` makes of those of all threads of a row; all of them get the
// same bits, in every run.
template <class P, class T, int kCount, class Op>
__device__ void combine_over_row(T (&values)[kCount], Op op) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      values[s] = op(values[s], __shfl_xor_sync(~0u, values[s], distance));
    }
  }
  if constexpr (P::kLanes > 32) {
    constexpr int kWarps = P::kLanes / 32;
    __shared__ T parts[kCount][kWarps];
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int s = 0; s < kCount; ++s) parts[s][threadIdx.x / 32] = values[s];
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      values[s] = parts[s][0];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) values[s] = op(values[s], parts[s][w]);
    }
    __syncthreads();  // parts are read; the next row may write its own
  }
}
template <class P, class T, int kCount>
__device__ void add_over_row(T (&sums)[kCount]) {
  combine_over_row<P>(sums, [](T a, T b) { return a + b; });
}

// Enough blocks to fill the card; they share the rows among them.
template <class P>
long blocks_for(long rows, const OnDevice& device) {
  const long wanted = (rows + P::kRows - 1) / P::kRows;
  const long most = 2048 / P::kBlock * device.multiprocessors();
  return wanted < most ? wanted : most;
}

// Whether rows of `cols` elements can be read and written 16 bytes at a time.
inline bool in_packs(const View& x, long cols) {
  const long size = x.type == Type::f64 ? 8 : x.type == Type::f32 ? 4 : 2;
  return !x || (reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && cols * size % 16 == 0 &&
                (x.row_stride * size % 16 == 0 || x.rows == 1));
}

// body(plan) with the plan for rows of `cols` elements.
template <class T, class Body>
void with_plan(long cols, bool packed, Body body) {
  constexpr int kPack = 16 / sizeof(T);
  const long packs = cols / kPack;
  if (!packed) return body(Plan<T, 1, 32, 0>{});
  if (packs <= 2 * 32) return body(Plan<T, kPack, 32, 2>{});
  if (packs <= 4 * 32) return body(Plan<T, kPack, 32, 4>{});
  if (packs <= 2 * kThreads) return body(Plan<T, kPack, kThreads, 2>{});
  if (packs <= 4 * kThreads) return body(Plan<T, kPack, kThreads, 4>{});
  return body(Plan<T, kPack, kThreads, 0>{});
}
template <class Body>
void with_plan(Type type, long cols, bool packed, Body body) {
  if (type == Type::f32) return with_plan<float>(cols, packed, body);
  if (type == Type::f64) return with_plan<double>(cols, packed, body);
  if (type == Type::bf16) return with_plan<__nv_bfloat16>(cols, packed, body);
  return with_plan<__half>(cols, packed, body);
}

}  // namespace mmfast::cuda

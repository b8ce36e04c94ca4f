#pragma once
// One source, one object per instruction set. Each object is compiled with flags of its own and
// with MMFAST_LEVEL, the namespace that keeps its copy of every function apart from the others.
#ifndef MMFAST_LEVEL
#error "compile with -DMMFAST_LEVEL=<name of the instruction set>"
#endif
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mmfast::MMFAST_LEVEL {

// The register tile: kTileRows rows of kTileVectors vectors. It must leave room in the register
// file for one row of B and a broadcast: 6x4 fills 24 of 32, 6x2 fills 12 of 16.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 6, kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileRows = 6, kTileVectors = 2;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTileRows = 6, kTileVectors = 4;
#else
constexpr int kVectorBytes = 16, kTileRows = 6, kTileVectors = 2;
#endif

// `Vec` is what registers hold, `Loose` what memory holds at any address, `Ints` the same lanes
// as integers (comparisons give them), `Bits` as patterns (whose sums may wrap).
template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef float Loose __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef int32_t LooseInts __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  using Int = int32_t;
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef double Loose __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Ints __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef int64_t LooseInts __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  using Int = int64_t;
};
template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
using Ints = typename Simd<T>::Ints;
template <class T>
constexpr int kWidth = kVectorBytes / sizeof(T);
template <class T>
constexpr int kTileCols = kTileVectors * kWidth<T>;

// Rows (and columns) of S in hand at once; every wider cut is a multiple of it.
constexpr long kBlock = 192;

template <class T>
inline Vec<T> load(const void* from) {
  return *static_cast<const typename Simd<T>::Loose*>(from);
}
template <class T>
inline void store(T* to, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::Loose*>(to) = v;
}
// x - 0 folds to a broadcast, x + 0 would not (it turns -0 into +0)
template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// No value stays in a vector register across this. Before a tile is summed: the compiler would keep
// constants of its epilogue there, and in their place sums in memory.
inline void clear_vectors() {
#if defined(__AVX512F__)
  asm volatile("" ::
                   : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                     "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17",
                     "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25",
                     "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");
#elif defined(__x86_64__)
  asm volatile("" ::
                   : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                     "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
#endif
}

}  // namespace mmfast::MMFAST_LEVEL

#pragma once
// One source, one object per instruction set. Each object is compiled with flags of its own and
// with MMFAST_LEVEL, the namespace that keeps its copy of every function apart from the others.
#ifndef MMFAST_LEVEL
#error "compile with -DMMFAST_LEVEL=<name of the instruction set>"
#endif
#include <cstdint>

#if defined(__AVX512F__)
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

}  // namespace mmfast::MMFAST_LEVEL

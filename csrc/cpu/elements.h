#pragma once
#include "pack.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Rows in the type they have in memory, read and written as vectors of the accumulator: for ops
// that visit a row once and would gain nothing from packing it.
namespace mmfast::MMFAST_LEVEL {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class E>
using Wide = std::conditional_t<sizeof(E) == 8, double, float>;
template <class E>
constexpr bool kHalf = sizeof(E) == 2;

// body(E{}) with the element type behind a view
template <class Body>
void with_element(Type type, Body body) {
  switch (type) {
    case Type::f32:
      return body(float{});
    case Type::f64:
      return body(double{});
    case Type::bf16:
      return body(Bf16{});
    default:
      return body(F16{});
  }
}

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

// kWidth elements as memory holds them.
template <class E>
using Packed = std::conditional_t<kHalf<E>, Halves, Vec<Wide<E>>>;

template <class E>
[[gnu::always_inline]] inline Vec<Wide<E>> widen(Packed<E> x) {
  if constexpr (kHalf<E>) {
    using Bits = Simd<float>::Bits;
    const Bits bits = __builtin_convertvector(x, Bits);
    if constexpr (std::is_same_v<E, Bf16>) return (Vec<float>)(bits << 16);
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__)
    return (Vec<float>)_mm256_cvtph_ps((__m128i)x);
#else
    // as float_of_f16
    const Bits magnitude = (bits & 0x7fff) << 13;
    const Vec<float> scaled = (Vec<float>)magnitude * 0x1p112f;
    const Bits top = (Bits)((Ints<float>)magnitude >= 0x0f800000) & 0x7f800000;
    return (Vec<float>)((Bits)scaled | (bits & 0x8000) << 16 | top);
#endif
  } else {
    return x;
  }
}

// Rounds to nearest, ties to even.
template <class E>
[[gnu::always_inline]] inline Packed<E> narrow(Vec<Wide<E>> x) {
  if constexpr (kHalf<E>) {
    using Bits = Simd<float>::Bits;
    const Bits bits = (Bits)x;
    if constexpr (std::is_same_v<E, Bf16>) {
#if defined(__AVX512BF16__)
      return (Halves)_mm512_cvtneps_pbh((__m512)x);  // f32 denormals become 0
#endif
      // as bf16_of_float
      const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
      return __builtin_convertvector(x == x ? rounded : bits >> 16 | 0x40, Halves);
    }
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
    return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
    // as f16_of_float
    const Bits sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    const auto size = (Ints<float>)magnitude;
    Bits half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
    const Bits denormal = (Bits)((Vec<float>)magnitude + 0.5f) - 0x3f000000;
    half = size < 0x38800000 ? denormal : half;
    half = size >= 0x477ff000 ? Bits{} + 0x7c00 : half;
    half = size > 0x7f800000 ? Bits{} + 0x7e00 : half;
    return __builtin_convertvector(half | sign, Halves);
#endif
  } else {
    return x;
  }
}

template <class E>
[[gnu::always_inline]] inline Vec<Wide<E>> read(const E* from) {
  if constexpr (kHalf<E>) {
    return widen<E>(*reinterpret_cast<const LooseHalves*>(from));
  } else {
    return load<E>(from);
  }
}
// the first `count` elements, zeros behind them
template <class E>
inline Vec<Wide<E>> read(const E* from, long count) {
  Packed<E> spare = {};
  std::memcpy(&spare, from, count * sizeof(E));
  return widen<E>(spare);
}

// kPast: past the caches, which spares reading a line that is overwritten in full; the address is
// a multiple of the vector's size, and fence() comes before another thread may look.
template <bool kPast, class E>
[[gnu::always_inline]] inline void write(E* to, Vec<Wide<E>> x) {
  const Packed<E> packed = narrow<E>(x);
#if defined(__x86_64__)
  if constexpr (kPast) {
    if constexpr (sizeof(packed) == 8) {
      _mm_stream_si64(reinterpret_cast<long long*>(to), (long long)packed);
    } else if constexpr (sizeof(packed) == 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)packed);
#if defined(__AVX__)
    } else if constexpr (sizeof(packed) == 32) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)packed);
#endif
#if defined(__AVX512F__)
    } else {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)packed);
#endif
    }
    return;
  }
#endif
  if constexpr (kHalf<E>) {
    *reinterpret_cast<LooseHalves*>(to) = packed;
  } else {
    store(to, packed);
  }
}
// the first `count` elements only
template <class E>
inline void write(E* to, Vec<Wide<E>> x, long count) {
  const Packed<E> packed = narrow<E>(x);
  std::memcpy(to, &packed, count * sizeof(E));
}

inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace mmfast::MMFAST_LEVEL

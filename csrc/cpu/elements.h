#pragma once
#include "pack.h"

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

// What is read or written at once, as vectors of the accumulator. Two neighbours in bf16 fill a
// lane of 32 bits and come apart without a shuffle: into a vector of the even ones and one of the
// odd.
template <class E>
constexpr int kParts = std::is_same_v<E, Bf16> ? 2 : 1;
template <class E>
constexpr long kSpan = kParts<E> * kWidth<Wide<E>>;
template <class E>
struct Span {
  Vec<Wide<E>> parts[kParts<E>];
};

// A span as memory holds it.
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
template <class E>
using Packed = std::conditional_t<std::is_same_v<E, F16>, Halves, Vec<Wide<E>>>;

template <class E>
[[gnu::always_inline]] inline Span<E> widen(Packed<E> x) {
  using Bits = Simd<float>::Bits;
  if constexpr (std::is_same_v<E, Bf16>) {
    return {(Vec<float>)((Bits)x << 16), (Vec<float>)((Bits)x & 0xffff0000)};
  } else if constexpr (std::is_same_v<E, F16>) {
#if defined(__AVX512F__)
    return {(Vec<float>)_mm512_cvtph_ps((__m256i)x)};
#elif defined(__F16C__)
    return {(Vec<float>)_mm256_cvtph_ps((__m128i)x)};
#else
    // as float_of_f16
    const Bits bits = __builtin_convertvector(x, Bits);
    const Bits magnitude = (bits & 0x7fff) << 13;
    const Vec<float> scaled = (Vec<float>)magnitude * 0x1p112f;
    const Bits top = (Bits)((Ints<float>)magnitude >= 0x0f800000) & 0x7f800000;
    return {(Vec<float>)((Bits)scaled | (bits & 0x8000) << 16 | top)};
#endif
  } else {
    return {x};
  }
}

// Rounds to nearest, ties to even.
template <class E>
[[gnu::always_inline]] inline Packed<E> narrow(Span<E> x) {
  using Bits [[maybe_unused]] = Simd<float>::Bits;
  if constexpr (std::is_same_v<E, Bf16>) {
    const auto [even, odd] = x.parts;
#if defined(__AVX512BF16__)
    // f32 denormals become 0; the even ones come out in one half, the odd ones in the other
    typedef uint16_t Lanes __attribute__((vector_size(kVectorBytes)));
    const auto halves = (Lanes)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    const Lanes dealt = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (Vec<float>)__builtin_shuffle(halves, dealt);
#else
    // as bf16_of_float
    const auto rounded = [](Vec<float> v) {
      const Bits bits = (Bits)v;
      return v == v ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
    };
    return (Vec<float>)(rounded(even) >> 16 | (rounded(odd) & 0xffff0000));
#endif
  } else if constexpr (std::is_same_v<E, F16>) {
    const Vec<float> v = x.parts[0];
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
    return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    // as f16_of_float
    const Bits bits = (Bits)v, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    const auto size = (Ints<float>)magnitude;
    Bits half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
    const Bits denormal = (Bits)((Vec<float>)magnitude + 0.5f) - 0x3f000000;
    half = size < 0x38800000 ? denormal : half;
    half = size >= 0x477ff000 ? Bits{} + 0x7c00 : half;
    half = size > 0x7f800000 ? Bits{} + 0x7e00 : half;
    return __builtin_convertvector(half | sign, Halves);
#endif
  } else {
    return x.parts[0];
  }
}

// the first `count` elements, zeros behind them
template <class E>
[[gnu::always_inline]] inline Span<E> read(const E* from, long count = kSpan<E>) {
  Packed<E> packed = {};
  std::memcpy(&packed, from, count * sizeof(E));
  return widen<E>(packed);
}
// the first `count` elements only
template <class E>
[[gnu::always_inline]] inline void write(E* to, Span<E> x, long count = kSpan<E>) {
  const Packed<E> packed = narrow<E>(x);
  std::memcpy(to, &packed, count * sizeof(E));
}

// Past the caches, which spares reading a line that is overwritten in full; the address is a
// multiple of the vector's size, and fence() comes before another thread may look.
template <class E>
[[gnu::always_inline]] inline void write_past(E* to, Span<E> x) {
#if defined(__x86_64__)
  const Packed<E> packed = narrow<E>(x);
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
#else
  write(to, x);
#endif
}

inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// A result larger than this leaves the caches before anybody reads it.
constexpr long kPastBytes = 8 << 20;

// Where rows of a result go, and how.
template <class E>
struct ResultRows {
  View view;
  bool past;

  explicit ResultRows(const View& v) : view(v) {
    const auto aligned = [](long bytes) { return bytes % kVectorBytes == 0; };
    const long bytes = v.rows * v.cols * long(sizeof(E));
    if (v.row_stride == v.cols) expect_writes(v.data, bytes);
    past = bytes > kPastBytes && aligned(v.cols * sizeof(E)) && aligned(v.row_stride * sizeof(E)) &&
           aligned(reinterpret_cast<uintptr_t>(v.data));
  }
  // make(d, count): the `count` elements from column d on, as a span
  template <class Make>
  void put(long i, Make make) const {
    E* out = &view.at<E>(i);
    past ? fill<true>(out, make) : fill<false>(out, make);
  }

 private:
  template <bool kPast, class Make>
  void fill(E* out, Make make) const {
    long d = 0;
    for (; d + kSpan<E> <= view.cols; d += kSpan<E>) {
      const Span<E> x = make(d, kSpan<E>);
      kPast ? write_past(out + d, x) : write(out + d, x);
    }
    if (d < view.cols) write(out + d, make(d, view.cols - d), view.cols - d);
  }
};

}  // namespace mmfast::MMFAST_LEVEL

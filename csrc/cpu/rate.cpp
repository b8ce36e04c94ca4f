// The peak behind every percentage: the register tile alone, on operands that stay in cache; and
// what bounds that, the multiply-adds of a tile whose operands stay in registers.
#include <chrono>
#include <random>

#include "sweep.h"

namespace mmfast::MMFAST_LEVEL {
namespace {

// Any numbers but zeros, which draw less power than data does.
template <class Unit>
void fill(const Buffer<Unit>& data, long count) {
  std::minstd_rand random(1);
  for (long i = 0; i < count; ++i) {
    const float x = float(random() % 2001) * 1e-3f - 1;
    if constexpr (sizeof(Unit) == 4 && std::is_integral_v<Unit>) {
      data[i] = bf16_of_float(x) | uint32_t{bf16_of_float(-x)} << 16;
    } else {
      data[i] = x;
    }
  }
}

// flop/s of step(), which does `flops` of them
template <class Step>
double rate(double seconds, double flops, Step step) {
  const auto begin = std::chrono::steady_clock::now();
  double elapsed = 0, done = 0;
  while (elapsed < seconds) {
    for (int i = 0; i < 200; ++i) step();
    done += 200 * flops;
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  return done / elapsed;
}

template <class P>
double tile_in_cache(double seconds) {
  using T = typename P::Scalar;
  constexpr long kDepth = 256;
  Buffer<typename P::Unit> a(P::kRows * padded<T>(kDepth)), b(kDepth * kTileCols<T>);
  Buffer<T> c(P::kRows * kTileCols<T>);
  fill(a, P::kRows * padded<T>(kDepth));
  fill(b, kDepth * kTileCols<T>);
  const TileRegisters<P> held;
  return rate(seconds, 2.0 * P::kPack * kDepth * P::kRows * kTileCols<T>, [&] {
    strip<P>(P::kRows, kDepth, {a, padded<T>(kDepth)}, b, {c, kTileCols<T>});
    asm volatile("" ::: "memory");
  });
}

// The compiler may think nothing of its value.
[[gnu::always_inline]] inline void opaque(Vec<float>& x) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(x));
#else
  asm volatile("" : "+w"(x));
#endif
}

double multiply_adds(double seconds) {
  constexpr int kDepth = 256;
  const auto each = [](Sums<float>& sum, auto body) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kTileVectors; ++j) body(sum[i][j]);
    }
  };
  return rate(seconds, 2.0 * kDepth * kTileRows * kTileCols<float>, [&] {
    clear_vectors();
    Sums<float> sum = {};
    Vec<float> x = {}, row = {};
    opaque(x), opaque(row);
    each(sum, [](Vec<float>& s) { opaque(s); });
    for (int p = 0; p < kDepth; ++p) {
      each(sum, [&](Vec<float>& s) { s += x * row; });
      opaque(x);  // or the products would be one
    }
    each(sum, [](Vec<float>& s) { opaque(s); });
  });
}

template <class Work>
double on_each(int threads, Work work) {
  std::vector<double> rates(threads);
  on_threads(threads, [&](int t) { rates[t] = work(); });
  double total = 0;
  for (const double rate : rates) total += rate;
  return total * 1e-9;
}

}  // namespace

double tile_rate(Type type, double seconds, int threads) {
  return with_arithmetic(type, [&](auto arithmetic) {
    return on_each(threads, [&] { return tile_in_cache<decltype(arithmetic)>(seconds); });
  });
}

double multiply_add_rate(double seconds, int threads) {
  return on_each(threads, [&] { return multiply_adds(seconds); });
}

}  // namespace mmfast::MMFAST_LEVEL

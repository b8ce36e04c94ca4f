// The register tile alone, on operands that stay in cache: the peak behind every percentage.
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

template <class P>
double flops_in(double seconds) {
  using T = typename P::Scalar;
  constexpr long kDepth = 256;
  Buffer<typename P::Unit> a(kTileRows * padded<T>(kDepth)), b(kDepth * kTileCols<T>);
  Buffer<T> c(kTileRows * kTileCols<T>);
  fill(a, kTileRows * padded<T>(kDepth));
  fill(b, kDepth * kTileCols<T>);
  const auto begin = std::chrono::steady_clock::now();
  double elapsed = 0, flops = 0;
  while (elapsed < seconds) {
    for (int i = 0; i < 200; ++i) {
      tile<P, kTileVectors, Stride::rows, false>(kDepth, {a, padded<T>(kDepth)}, {b, kTileCols<T>},
                                                 {c, kTileCols<T>});
      asm volatile("" ::: "memory");
    }
    flops += 200 * 2.0 * P::kPack * kDepth * kTileRows * kTileCols<T>;
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  return flops / elapsed;
}

}  // namespace

double tile_rate(Type type, double seconds, int threads) {
  return with_arithmetic(type, [&](auto arithmetic) {
    std::vector<double> rates(threads);
    on_threads(threads, [&](int t) { rates[t] = flops_in<decltype(arithmetic)>(seconds); });
    double total = 0;
    for (const double rate : rates) total += rate;
    return total * 1e-9;
  });
}

}  // namespace mmfast::MMFAST_LEVEL

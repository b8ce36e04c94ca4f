#pragma once
#include <bit>

#include "emulator.h"

// What a kernel takes from CUDA, by CUDA's names, on the emulator.
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define threadIdx (::mmfast::emulator::block->running().index)
#define blockIdx (::mmfast::emulator::block_index)
#define blockDim (::mmfast::emulator::block_size)
#define gridDim (::mmfast::emulator::grid_size)

inline void __syncthreads(std::source_location here = std::source_location::current()) {
  mmfast::emulator::block->running().barrier = here;
  mmfast::emulator::block->wait(mmfast::emulator::State::at_barrier);
}
inline void __syncwarp(unsigned mask = ~0u) {
  mmfast::emulator::in_warp(mmfast::emulator::Operation::sync, mask, 0, 0);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return mmfast::emulator::shuffle(mask, value, source & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return mmfast::emulator::shuffle(mask, value, mmfast::emulator::lane() ^ bits);
}
// past the end of the warp a lane gets its own value
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  const int lane = mmfast::emulator::lane(), source = lane + int(distance);
  return mmfast::emulator::shuffle(mask, value, source < 32 ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
  const int lane = mmfast::emulator::lane(), source = lane - int(distance);
  return mmfast::emulator::shuffle(mask, value, source >= 0 ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  using namespace mmfast::emulator;
  return unsigned(in_warp(Operation::ballot, mask, vote, 0));
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == mask; }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  return std::bit_cast<float>(uint32_t{x.bits} << 16);
}
// both to the nearest, ties to even
inline __nv_bfloat16 __float2bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00) {
    return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  }
  // 2^112 undoes the difference of the exponents' biases, and makes subnormal numbers normal
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}
inline __half __float2half(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000;
  const float size = std::bit_cast<float>(bits & 0x7fffffffu);
  if (x != x) return {0x7fff};
  if (size >= 65520.f) return {uint16_t(sign | 0x7c00)};
  if (size < 0x1p-14f) {  // an addition rounds to multiples of 2^-24
    return {uint16_t(sign | (std::bit_cast<uint32_t>(size + 0.5f) - 0x3f000000u))};
  }
  const uint32_t rest = (bits & 0x7fffffffu) - 0x38000000u;
  return {uint16_t(sign | (rest + 0xfff + (rest >> 13 & 1)) >> 13)};
}

// The emulator finds what it is there for: for each kind of mistake a kernel that makes it, which
// must be found, and the same kernel without, which must pass in every order.
#include <cmath>
#include <numeric>

#include "../check.h"
#include "emulated_cuda.h"

using namespace mmfast;

namespace {

// "" or what the emulator has to say, under one order of threads
template <class Body>
std::string complaint(emulator::Order order, Body body) {
  emulator::order = order;
  try {
    body();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

// out[i] = sum of the block's x, through shared memory
template <bool kBarrier>
__global__ void sum_of_block(const float* x, float* out) {
  __shared__ float parts[128];
  parts[threadIdx.x] = x[threadIdx.x];
  if constexpr (kBarrier) __syncthreads();
  float sum = 0;
  for (unsigned i = 0; i < blockDim.x; ++i) sum += parts[i];
  out[threadIdx.x] = sum;
  __syncthreads();
  parts[threadIdx.x] = -1;  // what the next block must not read
}

// twice, with or without waiting until the first results are read
template <bool kBarrier>
__global__ void two_turns(float* out) {
  __shared__ float part;
  for (int turn = 0; turn < 2; ++turn) {
    if (threadIdx.x == 0) part = float(turn + 1);
    __syncthreads();
    out[turn * blockDim.x + threadIdx.x] = part;
    if constexpr (kBarrier) __syncthreads();
  }
}

template <class Kernel>
int orders_that_are_wrong(Kernel kernel, const std::vector<float>& expected) {
  int wrong = 0;
  for (const auto order : emulator::kOrders) {
    std::vector<float> out(expected.size());
    const auto said = complaint(order, [&] { kernel(out.data()); });
    CHECK(said.empty(), "%s", said.c_str());
    wrong += out != expected;
  }
  return wrong;
}

void test_missing_barrier() {
  std::vector<float> x(128);
  std::iota(x.begin(), x.end(), 1.f);
  const std::vector<float> sums(128, 128 * 129 / 2);
  const auto run = [&](auto kernel) {
    return [&x, kernel](float* out) { emulator::run(2, 128, [&] { kernel(x.data(), out); }); };
  };
  CHECK(orders_that_are_wrong(run(sum_of_block<true>), sums) == 0);
  CHECK(orders_that_are_wrong(run(sum_of_block<false>), sums) > 0);

  std::vector<float> turns(128, 1.f);
  std::fill(turns.begin() + 64, turns.end(), 2.f);
  const auto twice = [](auto kernel) {
    return [kernel](float* out) { emulator::run(1, 64, [&] { kernel(out); }); };
  };
  CHECK(orders_that_are_wrong(twice(two_turns<true>), turns) == 0);
  CHECK(orders_that_are_wrong(twice(two_turns<false>), turns) > 0);
}

// writes one element too many where kOff is 1
template <int kOff>
__global__ void copy(const float* x, float* out, unsigned count) {
  for (unsigned i = threadIdx.x; i < count + kOff; i += blockDim.x) out[i] = x[i];
}

void test_tail() {
  const unsigned count = 45;
  const std::vector<float> x(64, 3.f);
  for (const auto order : emulator::kOrders) {
    for (const bool wrong : {false, true}) {
      std::vector<float> out(64, -1.f);  // the guard is what lies behind the 45th
      const auto said = complaint(order, [&] {
        emulator::run(1, 32, [&] { (wrong ? copy<1> : copy<0>)(x.data(), out.data(), count); });
      });
      CHECK(said.empty() && out[count - 1] == 3);
      CHECK((out[count] != -1) == wrong);
    }
  }
}

enum class Barrier { all, some, either_of_two, before_an_early_end };

template <Barrier kWhich>
__global__ void divergent(int* out) {
  const bool first = threadIdx.x < 40;
  if constexpr (kWhich == Barrier::all) __syncthreads();
  if constexpr (kWhich == Barrier::some) {
    if (first) __syncthreads();
    __syncthreads();
  }
  if constexpr (kWhich == Barrier::either_of_two) {
    if (first) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if constexpr (kWhich == Barrier::before_an_early_end) {
    if (!first) return;
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

template <Barrier kWhich>
std::string run_divergent(emulator::Order order) {
  std::vector<int> out(64);
  return complaint(order, [&] { emulator::run(1, 64, [&] { divergent<kWhich>(out.data()); }); });
}

void test_divergent_barrier() {
  for (const auto order : emulator::kOrders) {
    CHECK(run_divergent<Barrier::all>(order) == "");
    for (const auto& said :
         {run_divergent<Barrier::some>(order), run_divergent<Barrier::either_of_two>(order),
          run_divergent<Barrier::before_an_early_end>(order)}) {
      CHECK(said.starts_with("deadlock: thread 0 waits for the block in line "), "%s",
            said.c_str());
    }
  }
}

enum class Shuffle { whole, of_an_absent_lane, with_an_absent_lane, without_oneself, mixed };

template <Shuffle kWhich>
__global__ void shuffles(unsigned* out) {
  const unsigned lane = threadIdx.x;
  if constexpr (kWhich == Shuffle::whole) out[lane] = __shfl_xor_sync(~0u, lane, 1);
  if (lane >= 16) return;
  // of these sixteen, lane 15 asks for the 31st
  if constexpr (kWhich == Shuffle::of_an_absent_lane) out[lane] = __shfl_sync(0xffffu, lane, 31);
  if constexpr (kWhich == Shuffle::with_an_absent_lane) out[lane] = __shfl_xor_sync(~0u, lane, 1);
  if constexpr (kWhich == Shuffle::without_oneself) out[lane] = __shfl_sync(0xffu, lane, 0);
  if constexpr (kWhich == Shuffle::mixed) {
    out[lane] = lane ? __shfl_sync(0xffffu, lane, 0) : __ballot_sync(0xffffu, true);
  }
}

template <Shuffle kWhich>
std::string run_shuffles(emulator::Order order) {
  std::vector<unsigned> out(32);
  const auto said =
      complaint(order, [&] { emulator::run(1, 32, [&] { shuffles<kWhich>(out.data()); }); });
  for (unsigned i = 0; said.empty() && i < 32; ++i) CHECK(out[i] == (i ^ 1));
  return said;
}

void test_absent_lanes() {
  const auto has = [](const std::string& said, const char* words) {
    CHECK(said.find(words) != std::string::npos, "%s", said.c_str());
  };
  for (const auto order : emulator::kOrders) {
    CHECK(run_shuffles<Shuffle::whole>(order) == "");
    has(run_shuffles<Shuffle::of_an_absent_lane>(order), "reads lane 31, which is not in the mask");
    has(run_shuffles<Shuffle::with_an_absent_lane>(order), "waits for lanes of its warp");
    has(run_shuffles<Shuffle::without_oneself>(order), "is not in its own mask");
    has(run_shuffles<Shuffle::mixed>(order), "meet in different calls");
  }
}

__global__ void warp_functions(int* errors) {
  const int lane = int(threadIdx.x % 32);
  *errors += __shfl_sync(~0u, lane * 10, 5) != 50;
  *errors += __shfl_down_sync(~0u, lane, 3) != (lane + 3 < 32 ? lane + 3 : lane);
  *errors += __shfl_up_sync(~0u, double(lane), 2) != (lane >= 2 ? lane - 2 : lane);
  *errors += __ballot_sync(~0u, lane % 2 == 0) != 0x55555555u;
  *errors += __any_sync(~0u, false) || !__any_sync(~0u, lane == 7) || !__all_sync(~0u, true) ||
             __all_sync(~0u, lane != 7);
  if (lane < 4) *errors += __shfl_xor_sync(0xfu, lane, 2) != (lane ^ 2);
  __syncwarp();
}

void test_warp_functions() {
  for (const auto order : emulator::kOrders) {
    int errors = 0;
    CHECK(complaint(order, [&] { emulator::run(2, 96, [&] { warp_functions(&errors); }); }) == "");
    CHECK(errors == 0);
  }
}

// against the definition: the nearest value of the type, the even one of two
void test_half_types() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const __half half{uint16_t(bits)};
    const __nv_bfloat16 brain{uint16_t(bits)};
    const float h = __half2float(half), b = __bfloat162float(brain);
    CHECK(std::isnan(h) ? std::isnan(__half2float(__float2half(h))) : __float2half(h).bits == bits);
    CHECK(std::isnan(b) ? std::isnan(__bfloat162float(__float2bfloat16(b)))
                        : __float2bfloat16(b).bits == bits);
    if ((bits & 0x7fff) >= 0x7bff) continue;
    const float above = __half2float({uint16_t(bits + 1)}), middle = h + (above - h) / 2;
    CHECK(__float2half(middle).bits == bits + (bits & 1), "%x", bits);
    CHECK(__float2half(std::nextafter(middle, above)).bits == bits + 1, "%x", bits);
    CHECK(__float2half(std::nextafter(middle, h)).bits == bits, "%x", bits);
  }
  CHECK(__half2float({0x3c00}) == 1 && __half2float({0x0001}) == 0x1p-24f);
  CHECK(__half2float({0xc000}) == -2 && __half2float({0x7bff}) == 65504);
  CHECK(std::isinf(__half2float(__float2half(65520.f))) && __float2half(65519.f).bits == 0x7bff);
  CHECK(__bfloat162float({0xc040}) == -3);
  CHECK(__float2bfloat16(1.00390625f).bits == 0x3f80 &&
        __float2bfloat16(1.01171875f).bits == 0x3f82);
}

}  // namespace

int main() {
  test_missing_barrier();
  test_tail();
  test_divergent_barrier();
  test_absent_lanes();
  test_warp_functions();
  test_half_types();
}

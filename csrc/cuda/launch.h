#pragma once
#include <stdexcept>
#include <string>
#include <type_traits>

#include "ops.h"

// MMFAST_EMULATED: compiled by the C++ compiler and run on the CPU, for tests (tests/cpp/cuda).
#if defined(MMFAST_EMULATED)
#include "emulated_cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

// How kernels start, and how what goes wrong becomes an exception. Arguments of `launch` become
// what the kernel takes (common_type keeps them from having a say in it).
namespace mmfast::cuda {

// What is launched: an op by its name and by the shape its user knows.
struct Call {
  const char* op;
  long rows, cols;
  Type type;
  Queue queue;

  std::string text() const {
    const char* names[] = {"float32", "float64", "bfloat16", "float16", "int64", "bool"};
    return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "] " + names[int(type)];
  }
};

#if defined(MMFAST_EMULATED)

struct OnDevice {
  explicit OnDevice(const Call&) {}
  long multiprocessors() const { return 1; }
};

template <class... Params>
void launch(void (*kernel)(Params...), long blocks, int threads, const Call&,
            std::common_type_t<Params>... args) {
  emulator::run(unsigned(blocks), unsigned(threads), [&] { kernel(args...); });
}

#else

inline void check(cudaError_t status, const Call& call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would find it
  throw std::runtime_error(std::string(call.op) + ": CUDA launch failed for " + call.text() + ": " +
                           cudaGetErrorString(status));
}

// Makes the arrays' device the current one, until it goes out of scope.
class OnDevice {
 public:
  explicit OnDevice(const Call& call) : call_(call) {
    check(cudaGetDevice(&before_), call);
    if (before_ != call.queue.device) check(cudaSetDevice(call.queue.device), call);
  }
  ~OnDevice() {
    if (before_ != call_.queue.device) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  long multiprocessors() const {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, call_.queue.device),
          call_);
    return count;
  }

 private:
  const Call& call_;
  int before_ = 0;
};

template <class... Params>
void launch(void (*kernel)(Params...), long blocks, int threads, const Call& call,
            std::common_type_t<Params>... args) {
  void* pointers[] = {&args...};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)),
                         dim3(unsigned(threads)), pointers, 0,
                         static_cast<cudaStream_t>(call.queue.stream)),
        call);
}

#endif

}  // namespace mmfast::cuda

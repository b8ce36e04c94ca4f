#pragma once

// Before a function that the CPU's code and CUDA's kernels share.
#if defined(__CUDACC__)
#define MMFAST_HERE __host__ __device__ inline
#else
#define MMFAST_HERE inline
#endif

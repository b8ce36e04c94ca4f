#pragma once
#include "../view.h"

// The ops with a kernel in CUDA C++. Arrays lie on the card; the work is queued, not waited for.
// A launch that fails throws std::runtime_error with the op, the shape and CUDA's reason.
namespace mmfast::cuda {

struct Queue {
  int device = 0;
  void* stream = nullptr;  // a cudaStream_t; null is the default stream
};

// out = k1 a + k2 b, row by row; a, b, out [N, D] of one floating type, inner stride 1; lam has N
// elements, or row_stride 0; f32 (f64 for f64 inputs). csrc/slerp.h says what k1 and k2 are.
void slerp_forward(View a, View b, View lam, View out, Queue);

// Gradients of sum(g * out) into da, db [N, D] and dlam [N]; an empty view is not asked for.
void slerp_backward(View g, View a, View b, View lam, View da, View db, View dlam, Queue);

// out = max(x - tau, 0) by rows, each summing to 1; x and out [N, M] of one floating type, inner
// stride 1. csrc/ops.h says what becomes of NaN and infinities.
void sparsemax_forward(View x, View out, Queue);

// dx = g less its mean over the support of the weights p, 0 outside of it; all [N, M].
void sparsemax_backward(View g, View p, View dx, Queue);

}  // namespace mmfast::cuda

// A launch that cannot be made comes back as an exception with the op, the shape and the reason;
// on a machine without a driver as well as on a device that no machine has.
#include <stdexcept>
#include <string>

#include "../../../csrc/cuda/ops.h"
#include "../check.h"

using namespace mmfast;

namespace {

template <class Body>
void check_refused(Body body, const std::string& beginning) {
  std::string said;
  try {
    body();
  } catch (const std::runtime_error& error) {
    said = error.what();
  }
  CHECK(said.starts_with(beginning) && said.size() > beginning.size(), "%s", said.c_str());
}

}  // namespace

int main() {
  const cuda::Queue nowhere{1 << 20, nullptr};
  const auto view = [](Type type, long rows, long cols) {
    return View{nullptr, rows, cols, cols, 1, type};
  };
  const View x = view(Type::bf16, 7, 5), lam = view(Type::f32, 7, 1);
  check_refused([&] { cuda::slerp_forward(x, x, lam, x, nowhere); },
                "slerp: CUDA launch failed for [7, 5] bfloat16: ");
  float value = 0;
  View dlam = lam;
  dlam.data = &value;
  check_refused([&] { cuda::slerp_backward(x, x, x, lam, {}, {}, dlam, nowhere); },
                "slerp backward: CUDA launch failed for [7, 5] bfloat16: ");
  check_refused([&] { cuda::sparsemax_forward(x, x, nowhere); },
                "sparsemax: CUDA launch failed for [7, 5] bfloat16: ");
  check_refused([&] { cuda::sparsemax_backward(x, x, x, nowhere); },
                "sparsemax backward: CUDA launch failed for [7, 5] bfloat16: ");
  // nothing to do needs no card
  const View empty = view(Type::f32, 0, 5);
  cuda::slerp_forward(empty, empty, lam, empty, nowhere);
  cuda::slerp_backward(x, x, x, lam, {}, {}, {}, nowhere);
  cuda::sparsemax_forward(empty, empty, nowhere);
  cuda::sparsemax_backward(empty, empty, empty, nowhere);
}

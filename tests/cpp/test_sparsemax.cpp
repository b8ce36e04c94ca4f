// sparsemax on random shapes, strides, types and spreads, at every level, against sorting in
// double. Outputs sit between guard values; the address sanitizer watches the rest.
#include <cmath>

#include "../../csrc/levels.h"
#include "../../csrc/ops.h"
#include "sorted_weights.h"
#include "values.h"

using namespace mmfast;
using namespace mmfast::testing;

namespace {

void check_once(int threads) {
  const Type types[] = {Type::f32, Type::f64, Type::bf16, Type::f16};
  const Type type = types[integer(0, 3)];
  const long N = integer(1, integer(0, 3) ? 9 : 300);
  const long M = N < 10 && integer(0, 5) == 0 ? integer(1, 5000) : integer(1, 150);
  const double spread = std::pow(10.0, integer(-5, 2)), center = integer(0, 2) ? 0 : 50 * normal();
  // half types hold multiples of 1/32 up to 8: many ties
  const bool masked = integer(0, 2) == 0, step = integer(0, 1);
  const long empty = masked ? integer(0, N - 1) : -1;
  Input x(type, N, M, [&](long, long) {
    double value = center + spread * normal();
    if (size_of(type) == 2) value = std::clamp(value, -7.0, 7.0);
    return step ? std::nearbyint(value * 4) / 4 : value;
  });
  for (long i = 0; masked && i < N; ++i) {
    for (long j = 0; j < M; ++j) {
      if (i != empty && integer(0, 2)) continue;
      x.values[i * M + j] = -kInfinity;
      char* at = x.bytes.data() + (i * x.view.row_stride + j) * size_of(type);
      if (size_of(type) == 2) {
        const uint16_t bits = type == Type::f16 ? 0xfc00 : 0xff80;
        std::memcpy(at, &bits, 2);
      } else {
        put(type, at, -kInfinity);
      }
    }
  }
  const Input g(type, N, M, [](long, long) { return normal(); });
  const Output p(type, N, M), dx(type, N, M);
  const Run run{threads, {}};
  sparsemax_forward(x.view, p.view, run);
  sparsemax_backward(g.view, p.view, dx.view, run);
  CHECK(p.guarded() && dx.guarded());

  const double rounding = type == Type::f64    ? 1e-13
                          : type == Type::f32  ? 2e-7
                          : type == Type::bf16 ? 4e-3
                                               : 5e-4;
  for (long i = 0; i < N; ++i) {
    const auto want = sorted_weights(&x.values[i * M], M);
    double sum = 0, count = 0;
    for (long j = 0; j < M; ++j) {
      const double got = p.at(i * M + j);
      CHECK(std::abs(got - want[j]) <= rounding * want[j] + (type == Type::f16 ? 6e-8 : 1e-9),
            "p: %.9g, not %.9g; %ld x %ld, type %d", got, want[j], N, M, int(type));
      // in f64 the sums are rounded, in one order or another
      const bool at_tau = type == Type::f64 && std::max(got, want[j]) < 1e-13;
      CHECK((got > 0) == (want[j] > 0) || at_tau, "support: %.9g, %.9g", got, want[j]);
      if (got > 0) sum += g.values[i * M + j], count += 1;
    }
    for (long j = 0; j < M; ++j) {
      const double up = g.values[i * M + j];
      const double expected = p.at(i * M + j) > 0 ? up - sum / count : 0;
      CHECK(std::abs(dx.at(i * M + j) - expected) <= rounding * (1 + std::abs(up) + std::abs(sum)),
            "dx: %.9g, not %.9g; %ld x %ld, type %d", dx.at(i * M + j), expected, N, M, int(type));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 300;
  for (const auto& level : isa_levels()) {
    set_isa(level);
    for (int i = 0; i < rounds; ++i) check_once(1 + i % 3);
    std::printf("%s: %d cases\n", level.c_str(), rounds);
  }
}

// pairwise_softplus on random shapes, strides and options, at every level, against the definition
// in double. Outputs sit between guard values; the address sanitizer watches the rest.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "../../csrc/levels.h"
#include "../../csrc/ops.h"
#include "values.h"

using namespace mmfast;
using namespace mmfast::testing;

namespace {

// A gradient's memory with guards behind it, and what it should hold.
struct Output {
  static constexpr long kGuard = 64;
  bool asked = integer(0, 2);
  Type type;
  long rows, cols;
  std::vector<double> expected, terms;  // sums, and of the magnitudes of what they sum
  std::vector<char> bytes;

  Output(Type wide, long n, long d)
      : type(wide),
        rows(n),
        cols(d),
        expected(n * d),
        terms(n * d),
        bytes(n * d * size_of(wide) + kGuard, 0x5a) {}
  View view() { return asked ? View{bytes.data(), rows, cols, cols, 1, type} : View{}; }
  void add(long i, double x) {
    expected[i] += x;
    terms[i] += std::abs(x);
  }
  void check(double tolerance) const {
    const double size = std::max(1e-3, *std::max_element(terms.begin(), terms.end()));
    for (long i = 0; asked && i < rows * cols; ++i) {
      const double got = get(type, bytes.data() + i * size_of(type));
      CHECK(std::abs(got - expected[i]) <= tolerance * size, "%g, not %g", got, expected[i]);
    }
    const long first = asked ? rows * cols * size_of(type) : 0;
    for (long i = first; i < long(bytes.size()); ++i) CHECK(bytes[i] == 0x5a);
  }
};

void check_once(int threads) {
  const Type types[] = {Type::f32, Type::f64, Type::bf16, Type::f16};
  const Type type = types[integer(0, 3)], wide = type == Type::f64 ? Type::f64 : Type::f32;
  const long N = integer(1, integer(0, 3) ? 40 : 420), M = integer(1, integer(0, 3) ? 40 : 420);
  const long D = integer(1, integer(0, 3) ? 20 : 150);
  const auto normals = [&](long rows) {
    return Input(type, rows, D, [](long, long) { return normal(); });
  };
  const Input q = normals(N), k = normals(M);
  Pairs pairs{q.view, k.view, normal() * (integer(0, 3) ? 1 : 20), {}, {}, {}};
  const double bias = 5 * normal();
  std::vector<int64_t> q_ids(N), k_ids(M);
  if (integer(0, 1)) {
    for (auto* ids : {&q_ids, &k_ids}) {
      for (auto& id : *ids) id = integer(-2, 2);
    }
    pairs.q_ids = {q_ids.data(), N, 1, 1, 1, Type::i64};
    pairs.k_ids = {k_ids.data(), M, 1, 1, 1, Type::i64};
  }

  Output dq(wide, N, D), dk(wide, M, D);
  const bool need_scale = integer(0, 1), need_bias = integer(0, 1);
  double value = 0, d_scale = 0, d_bias = 0, size = 1e-3, largest = 1;
  for (long i = 0; i < N; ++i) {
    for (long j = 0; j < M; ++j) {
      if (pairs.q_ids && q_ids[i] == k_ids[j]) continue;
      double dot = 0;
      for (long d = 0; d < D; ++d) dot += q.values[i * D + d] * k.values[j * D + d];
      const double score = pairs.scale * dot + bias;
      const double power = std::exp(-std::abs(score)),
                   slope = (score > 0 ? 1 : power) / (1 + power);
      largest = std::max({largest, std::abs(pairs.scale * dot), std::abs(score)});
      value += std::max(score, 0.0) + std::log1p(power);
      d_scale += slope * dot;
      size += slope * std::abs(dot);
      d_bias += slope;
      for (long d = 0; d < D; ++d) {
        dq.add(i * D + d, pairs.scale * slope * k.values[j * D + d]);
        dk.add(j * D + d, pairs.scale * slope * q.values[i * D + d]);
      }
    }
  }
  const SoftplusSum got =
      pairwise_softplus(pairs, bias, dq.view(), dk.view(), need_scale, need_bias, Run{threads, {}});
  const double fine = type == Type::f64 ? 1e-12 : 1e-6 * largest;
  const double coarse = type == Type::bf16 ? 4e-3 + fine : fine;
  const auto close = [&](double x, double exact, double tolerance, double terms, const char* what) {
    CHECK(std::abs(x - exact) <= tolerance * terms, "%s: %.9g, not %.9g; type %d; %ld x %ld x %ld",
          what, x, exact, int(type), N, M, D);
  };
  close(got.value, value, fine, value + d_bias + 1e-30, "value");
  close(got.d_scale, need_scale ? d_scale : 0, coarse, size, "scale");
  close(got.d_bias, need_bias ? d_bias : 0, fine, d_bias + 1e-30, "bias");
  dq.check(coarse);
  dk.check(coarse);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 500;
  for (const auto& level : isa_levels()) {
    set_isa(level);
    for (int i = 0; i < rounds; ++i) check_once(1 + i % 3);
    std::printf("%s: %d cases\n", level.c_str(), rounds);
  }
}

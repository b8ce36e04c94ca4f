// shift_landscape on random shapes, types, terms, scales and chunks, at every level, against the
// definition in double. Outputs sit between guard values.
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/levels.h"
#include "../../csrc/ops.h"
#include "values.h"

using namespace mmfast;
using namespace mmfast::testing;

namespace {

struct Side {
  Input rows, inverse, offsets, factors;
  Side(Type type, Type wide, long N, long D, long L)
      : rows(type, N, D, [](long, long) { return normal(); }),
        inverse(wide, N, 1, [&](long, long) { return (0.5 + integer(0, 8)) / std::sqrt(D) / 8; }),
        offsets(wide, L, N, [](long, long) { return normal(); }),
        factors(wide, L, N, [](long, long) { return 0.1 + 0.1 * integer(0, 9); }) {}
  Shifted view() const { return {rows.view, inverse.view, offsets.view, factors.view}; }
};

// Rows of results with a guard between them.
struct Output {
  long rows, N;
  Type type;
  std::vector<char> bytes;
  Output(Type wide, long r, long n)
      : rows(r), N(n), type(wide), bytes(r * (n + 3) * size_of(wide), 0x5a) {}
  View view() { return {bytes.data(), rows, N, N + 3, 1, type}; }
  double at(long r, long i) const {
    return get(type, bytes.data() + (r * (N + 3) + i) * size_of(type));
  }
  void check_guards() const {
    for (long r = 0; r < rows; ++r) {
      for (long b = N * size_of(type); b < (N + 3) * size_of(type); ++b) {
        CHECK(bytes[r * (N + 3) * size_of(type) + b] == 0x5a);
      }
    }
  }
};

// log-sum-exp of what it is given, and the largest size among its terms
struct Sum {
  double best = -std::numeric_limits<double>::infinity(), total = 0, size = 0;
  void add(double x, double terms) {
    if (x > best) total = total * std::exp(best - x), best = x;
    total += std::exp(x - best);
    size = std::max(size, terms);
  }
  double log() const { return best + std::log(total); }
};

void check_once(int threads) {
  const Type types[] = {Type::f32, Type::f64, Type::bf16, Type::f16};
  const Type type = types[integer(0, 3)], wide = type == Type::f64 ? Type::f64 : Type::f32;
  const long N = integer(1, integer(0, 3) ? 40 : 420), D = integer(1, integer(0, 3) ? 20 : 70);
  const long L = integer(1, 3), chunk = integer(0, 1) ? N + integer(0, 3) : integer(1, N);
  const Side x(type, wide, N, D, L), y(type, wide, N, D, L);
  std::vector<double> scales(integer(1, 4));
  for (double& scale : scales)
    scale = std::exp2(integer(-3, integer(0, 2) ? 2 : 9)) * integer(1, 3);
  const long T = long(scales.size());
  Output rows(wide, L * T, N), columns(wide, L * T, N);
  shift_landscape(x.view(), y.view(), scales, chunk, rows.view(), columns.view(), Run{threads, {}});
  rows.check_guards();
  columns.check_guards();
  const double eps = type == Type::f64 ? 1e-15 : 3e-7;
  for (long l = 0; l < L; ++l) {
    std::vector<Sum> sums(2 * T * N);
    for (long i = 0; i < N; ++i) {
      for (long j = i / chunk * chunk; j < std::min(N, (i / chunk + 1) * chunk); ++j) {
        if (i == j) continue;
        const auto of = [&](const Input& terms, long at) { return terms.values[l * N + at]; };
        double dot = 0, terms = 0;
        for (long d = 0; d < D; ++d) {
          const double term = x.rows.values[i * D + d] * y.rows.values[j * D + d];
          dot += term, terms += std::abs(term);
        }
        const double inverse = x.inverse.values[i] * y.inverse.values[j];
        const double factor = of(x.factors, i) * of(y.factors, j);
        const double a = of(x.offsets, i), b = of(y.offsets, j);
        const double z = (dot * inverse + a + b) * factor;
        const double size = (terms * inverse + std::abs(a) + std::abs(b)) * factor;
        for (long t = 0; t < T; ++t) {
          sums[t * N + i].add(scales[t] * z, scales[t] * size);
          sums[(T + t) * N + j].add(scales[t] * z, scales[t] * size);
        }
      }
    }
    for (long t = 0; t < T; ++t) {
      for (long i = 0; i < N; ++i) {
        const auto close = [&](const Output& got, const Sum& sum, const char* what) {
          const double exact = sum.log(), found = got.at(l * T + t, i);
          CHECK(found == exact || std::abs(found - exact) <= 4 * eps * (1 + sum.size),
                "%s %ld: %.9g, not %.9g; N %ld, D %ld, chunk %ld, scale %g, type %d", what, i,
                found, exact, N, D, chunk, scales[t], int(type));
        };
        close(rows, sums[t * N + i], "row");
        close(columns, sums[(T + t) * N + i], "column");
      }
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

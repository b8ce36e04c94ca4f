// slerp on random shapes, strides, types and angles, at every level, against plain loops in double.
// Outputs sit between guard values; the address sanitizer watches the rest.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/levels.h"
#include "../../csrc/ops.h"
#include "values.h"

using namespace mmfast;
using namespace mmfast::testing;

namespace {

// The weights and their slopes for angles away from 0 and pi, as one writes them down.
struct Row {
  double k1, k2, k1_by_c, k2_by_c, k1_by_lam, k2_by_lam;
  Row(double c, double lam) {
    const double theta = std::acos(c), s = std::sin(theta);
    const auto weight = [&](double l) { return std::sin(l * theta) / s; };
    const auto by_c = [&](double l) {
      return -(l * std::cos(l * theta) * s - std::sin(l * theta) * c) / (s * s * s);
    };
    const auto by_lam = [&](double l) { return std::cos(l * theta) * theta / s; };
    k1 = weight(lam), k2 = weight(1 - lam);
    k1_by_c = by_c(lam), k2_by_c = by_c(1 - lam);
    k1_by_lam = by_lam(lam), k2_by_lam = -by_lam(1 - lam);
  }
};

void check_once(int threads) {
  const Type types[] = {Type::f32, Type::f64, Type::bf16, Type::f16};
  const Type type = types[integer(0, 3)], wide = type == Type::f64 ? Type::f64 : Type::f32;
  // wide rows are taken together in smaller blocks, down to one
  const bool wide_rows = integer(0, 30) == 0;
  const long N = integer(1, wide_rows || integer(0, 3) ? 40 : 900);
  const long D = wide_rows ? integer(500, 10000) : integer(1, integer(0, 3) ? 40 : 300);
  // inner products within +-0.9, wherever rounding to a half type takes them
  const double size = 0.9 / std::sqrt(double(D));
  const auto entry = [&](long, long) { return size * (2.0 * integer(0, 1000) / 1000 - 1); };
  const Input a(type, N, D, entry), b(type, N, D, entry);
  const Input g(type, N, D, [](long, long) { return normal(); });
  const bool one = integer(0, 1);
  const Input lam(wide, one ? 1 : N, 1, [](long, long) { return 0.5 + 0.5 * normal(); });
  View lam_view = lam.view;
  if (one) lam_view.rows = N, lam_view.row_stride = 0;

  const bool need_a = integer(0, 2), need_b = integer(0, 2), need_lam = integer(0, 2);
  const Output out(type, N, D, true), da(type, N, D, need_a), db(type, N, D, need_b);
  const Output dlam(wide, N, 1, need_lam);
  const Run run{threads, {}};
  slerp_forward(a.view, b.view, lam_view, out.view, run);
  slerp_backward(g.view, a.view, b.view, lam_view, da.view, db.view, dlam.view, run);
  CHECK(out.guarded() && da.guarded() && db.guarded() && dlam.guarded());

  const double rounding = type == Type::f64    ? 1e-13
                          : type == Type::f32  ? 2e-5
                          : type == Type::bf16 ? 8e-3
                                               : 1e-3;
  const auto close = [&](double got, double expected, double tolerance, const char* name) {
    CHECK(std::abs(got - expected) <= tolerance * (1 + std::abs(expected)),
          "%s: %.9g, not %.9g; %ld x %ld, type %d", name, got, expected, N, D, int(type));
  };
  for (long i = 0; i < N; ++i) {
    const double *x = &a.values[i * D], *y = &b.values[i * D], *up = &g.values[i * D];
    double c = 0, along_a = 0, along_b = 0;
    for (long d = 0; d < D; ++d) {
      c += x[d] * y[d];
      along_a += up[d] * x[d];
      along_b += up[d] * y[d];
    }
    const Row k(c, lam.values[one ? 0 : i]);
    const double g_c = along_a * k.k1_by_c + along_b * k.k2_by_c;
    for (long d = 0; d < D; ++d) {
      close(out.at(i * D + d), k.k1 * x[d] + k.k2 * y[d], rounding, "out");
      if (need_a) close(da.at(i * D + d), k.k1 * up[d] + g_c * y[d], rounding, "da");
      if (need_b) close(db.at(i * D + d), k.k2 * up[d] + g_c * x[d], rounding, "db");
    }
    if (need_lam) {
      close(dlam.at(i), along_a * k.k1_by_lam + along_b * k.k2_by_lam,
            type == Type::f64 ? 1e-12 : 5e-5, "dlam");
    }
  }
}

// Results that go past the caches: the same bits as the rows have in a small one.
void check_large(Type type, long D) {
  const long few = 64, many = (9 << 20) / (D * size_of(type)) / few * few;
  const Input a(type, few, D, [](long, long) { return 0.1 * normal(); });
  const Input lam(type == Type::f64 ? Type::f64 : Type::f32, 1, 1, [](long, long) { return 0.3; });
  const View one = {lam.view.data, few, 1, 0, 1, lam.view.type};
  const Output small(type, few, D, true);
  const Run run{2, {}};
  slerp_forward(a.view, a.view, one, small.view, run);
  std::vector<char> bytes(many * D * size_of(type) + 64);
  char* start = bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64);
  for (long i = 0; i < many; i += few) {
    for (long r = 0; r < few; ++r) {
      std::memcpy(start + (i + r) * D * size_of(type),
                  static_cast<const char*>(a.view.data) + r * a.view.row_stride * size_of(type),
                  D * size_of(type));
    }
  }
  // in place: every row is read before it is written
  const View all = {start, many, D, D, 1, type};
  slerp_forward(all, all, {lam.view.data, many, 1, 0, 1, lam.view.type}, all, run);
  for (long i = 0; i < many; i += few) {
    CHECK(!std::memcmp(start + i * D * size_of(type), small.bytes.data(), few * D * size_of(type)),
          "rows from %ld, type %d", i, int(type));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 400;
  for (const auto& level : isa_levels()) {
    set_isa(level);
    for (int i = 0; i < rounds; ++i) check_once(1 + i % 3);
    check_large(Type::f32, 64);
    check_large(Type::f64, 96);
    check_large(Type::bf16, 128);
    check_large(Type::f16, 64);
    std::printf("%s: %d cases\n", level.c_str(), rounds);
  }
}

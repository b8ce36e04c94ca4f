// pairwise_lse on random shapes, strides and options, at every level, against the definition in
// double. Outputs sit between guard values; the address sanitizer watches the rest.
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/levels.h"
#include "../../csrc/ops.h"
#include "values.h"

using namespace mmfast;
using namespace mmfast::testing;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// A matrix of random values.
Input normals(Type type, long rows, long cols) {
  return {type, rows, cols, [](long, long) { return normal(); }};
}

View vector_view(std::vector<char>& bytes, Type type) {
  return {bytes.data(), long(bytes.size()) / size_of(type), 1, 1, 1, type};
}

double close(double got, double expected, double tolerance, double size) {
  if (!std::isfinite(expected)) return got == expected;
  return std::abs(got - expected) <= tolerance * size;
}

void check_once(int threads) {
  const Type types[] = {Type::f32, Type::f64, Type::bf16, Type::f16};
  const Type type = types[integer(0, 3)], wide = type == Type::f64 ? Type::f64 : Type::f32;
  const long N = integer(1, integer(0, 3) ? 40 : 420), M = integer(1, integer(0, 3) ? 40 : 420);
  const long D = integer(1, integer(0, 3) ? 20 : 150);
  const Input q = normals(type, N, D), k = normals(type, M, D);
  Pairs pairs{q.view, k.view, normal() * (integer(0, 3) ? 1 : 20), {}, {}, {}};
  std::vector<int64_t> q_ids(N), k_ids(M);
  if (integer(0, 1)) {
    const int64_t step = integer(0, 1) ? 1 : int64_t{1} << 61;
    for (auto* ids : {&q_ids, &k_ids}) {
      for (auto& id : *ids) id = step * integer(-2, 2);
    }
    pairs.q_ids = {q_ids.data(), N, 1, 1, 1, Type::i64};
    pairs.k_ids = {k_ids.data(), M, 1, 1, 1, Type::i64};
  }
  std::vector<char> mask(N * M);
  for (auto& keep : mask) keep = integer(0, 2) != 0;
  if (integer(0, 1)) {
    pairs.mask = {mask.data(), N, M, M, 1, Type::b8};
    if (integer(0, 1)) pairs.mask.row_stride = 1, pairs.mask.col_stride = N;
  }

  const auto score = [&](long i, long j) {
    double dot = 0;
    for (long d = 0; d < D; ++d) dot += q.values[i * D + d] * k.values[j * D + d];
    const bool stays =
        (!pairs.q_ids || q_ids[i] != k_ids[j]) && (!pairs.mask || pairs.mask.at<bool>(i, j));
    return stays ? pairs.scale * dot : -kInf;
  };
  std::vector<double> rows(N, -kInf), columns(M, -kInf), s(N * M);
  double largest = 1;
  const auto add = [](double a, double b) {
    const double top = std::max(a, b);
    return top == -kInf ? top : top + std::log(std::exp(a - top) + std::exp(b - top));
  };
  for (long i = 0; i < N; ++i) {
    for (long j = 0; j < M; ++j) {
      s[i * M + j] = score(i, j);
      if (std::isfinite(s[i * M + j])) largest = std::max(largest, std::abs(s[i * M + j]));
      rows[i] = add(rows[i], s[i * M + j]);
      columns[j] = add(columns[j], s[i * M + j]);
    }
  }
  const double tolerance = type == Type::f64 ? 1e-13 : type == Type::bf16 ? 6e-6 : 1e-6;
  std::vector<char> row_bytes(N * size_of(wide)), column_bytes(M * size_of(wide));
  const View r = vector_view(row_bytes, wide), c = vector_view(column_bytes, wide);
  pairwise_lse_forward(pairs, r, c, Run{threads, {}});
  const auto value = [&](std::vector<char>& bytes, long i) {
    return get(wide, bytes.data() + i * size_of(wide));
  };
  for (long i = 0; i < N; ++i) {
    CHECK(close(value(row_bytes, i), rows[i], tolerance, largest),
          "row %ld of %ld x %ld x %ld, %g %g", i, N, M, D, value(row_bytes, i), rows[i]);
  }
  for (long j = 0; j < M; ++j) {
    CHECK(close(value(column_bytes, j), columns[j], tolerance, largest),
          "column %ld of %ld x %ld x %ld, type %d, %.9g, not %.9g (scores up to %g)", j, N, M, D,
          int(type), value(column_bytes, j), columns[j], largest);
  }

  // rows alone, with the mean of k under the softmax of each
  constexpr long kGuard = 64;
  std::vector<char> again(N * size_of(wide)), mean_bytes(N * D * size_of(wide) + kGuard, 0x5a);
  pairwise_lse_mean(pairs, vector_view(again, wide), {mean_bytes.data(), N, D, D, 1, wide},
                    Run{threads, {}});
  const double rough = type == Type::f64 ? 1e-11 : type == Type::bf16 ? 2e-2 : 1e-5 * largest;
  double size = 0;
  for (const double x : k.values) size = std::max(size, std::abs(x));
  for (long i = 0; i < N; ++i) {
    CHECK(close(value(again, i), rows[i], tolerance, largest), "row %ld: %g, not %g", i,
          value(again, i), rows[i]);
    for (long d = 0; d < D; ++d) {
      double mean = 0;
      for (long j = 0; j < M; ++j) {
        if (s[i * M + j] > -kInf) mean += std::exp(s[i * M + j] - rows[i]) * k.values[j * D + d];
      }
      CHECK(close(value(mean_bytes, i * D + d), mean, rough, size),
            "mean %ld of %ld x %ld x %ld, type %d: %g, not %g", i, N, M, D, int(type),
            value(mean_bytes, i * D + d), mean);
    }
  }

  // gradients, each asked for or not
  const bool by_rows = integer(0, 2), by_columns = !by_rows || integer(0, 1);
  std::vector<char> g_row_bytes(N * size_of(wide)), g_column_bytes(M * size_of(wide));
  std::vector<double> g(N * M, 0.0), dq(N * D, 0.0), dk(M * D, 0.0);
  std::vector<double> g_rows(N), g_columns(M);
  for (long i = 0; i < N; ++i) {
    g_rows[i] = exact(wide, normal());
    put(wide, g_row_bytes.data() + i * size_of(wide), g_rows[i]);
  }
  for (long j = 0; j < M; ++j) {
    g_columns[j] = exact(wide, normal());
    put(wide, g_column_bytes.data() + j * size_of(wide), g_columns[j]);
  }
  double d_scale = 0, size_q = 1e-30, size_k = 1e-30, size_scale = 1e-30;
  for (long i = 0; i < N; ++i) {
    for (long j = 0; j < M; ++j) {
      if (s[i * M + j] == -kInf) continue;
      double& at = g[i * M + j];
      if (by_rows) at += g_rows[i] * std::exp(s[i * M + j] - rows[i]);
      if (by_columns) at += g_columns[j] * std::exp(s[i * M + j] - columns[j]);
      double dot = 0;
      for (long d = 0; d < D; ++d) {
        dot += q.values[i * D + d] * k.values[j * D + d];
        dq[i * D + d] += pairs.scale * at * k.values[j * D + d];
        dk[j * D + d] += pairs.scale * at * q.values[i * D + d];
      }
      d_scale += at * dot;
      size_scale += std::abs(at * dot);
    }
  }
  for (const double x : dq) size_q = std::max(size_q, std::abs(x));
  for (const double x : dk) size_k = std::max(size_k, std::abs(x));
  const bool need_q = integer(0, 2), need_k = integer(0, 2), need_scale = integer(0, 2);
  std::vector<char> dq_bytes(N * D * size_of(type) + kGuard, 0x5a);
  std::vector<char> dk_bytes(M * D * size_of(type) + kGuard, 0x5a);
  const View none;
  const double got = pairwise_lse_backward(
      pairs, by_rows ? vector_view(g_row_bytes, wide) : none,
      by_columns ? vector_view(g_column_bytes, wide) : none, by_rows ? r : none,
      by_columns ? c : none, need_q ? View{dq_bytes.data(), N, D, D, 1, type} : none,
      need_k ? View{dk_bytes.data(), M, D, D, 1, type} : none, need_scale, Run{threads, {}});
  const double coarse = type == Type::f64    ? 1e-11
                        : type == Type::f32  ? 1e-5 * largest
                        : type == Type::bf16 ? 2e-2
                                             : 2e-3;
  for (long i = 0; need_q && i < N * D; ++i) {
    CHECK(close(get(type, dq_bytes.data() + i * size_of(type)), dq[i], coarse, size_q + 1e-3), "%d",
          int(type));
  }
  for (long i = 0; need_k && i < M * D; ++i) {
    CHECK(close(get(type, dk_bytes.data() + i * size_of(type)), dk[i], coarse, size_k + 1e-3));
  }
  CHECK(close(got, need_scale ? d_scale : 0, coarse, size_scale + 1e-3),
        "scale %.9g, not %.9g (terms of %g); type %d, need %d %d; %ld x %ld x %ld", got, d_scale,
        size_scale, int(type), need_q, need_k, N, M, D);
  for (long i = 0; i < kGuard; ++i) {
    for (const auto* bytes : {&dq_bytes, &dk_bytes, &mean_bytes}) {
      CHECK((*bytes)[bytes->size() - 1 - i] == 0x5a);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 500;
  for (const auto& level : isa_levels()) {
    set_isa(level);
    for (int i = 0; i < rounds; ++i) check_once(1 + i % 3);
    std::printf("%s: %d cases\n", level.c_str(), rounds);
  }
  bool refused = false;
  try {
    set_isa("sse9");
  } catch (const std::invalid_argument& error) {
    refused = std::string(error.what()).find("generic") != std::string::npos;
  }
  CHECK(refused);
}

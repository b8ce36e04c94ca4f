// fdt_pool on random shapes, types and masks, at every level, against the definition in double:
// winners exactly, the rest within rounding, nothing written outside.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../../csrc/levels.h"
#include "../../csrc/ops.h"
#include "values.h"

using namespace mmfast;
using namespace mmfast::testing;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// Room for results, with marks behind it.
struct Output {
  std::vector<char> bytes;
  View view;
  Output(Type type, long rows, long cols, int size) : bytes(rows * cols * size + 64, 77) {
    view = {bytes.data(), rows, cols, cols, 1, type};
  }
  void check_marks() const {
    for (size_t i = bytes.size() - 64; i < bytes.size(); ++i) CHECK(bytes[i] == 77);
  }
  double at(long i, long j) const {
    return get(view.type, bytes.data() + (i * view.cols + j) * size_of(view.type));
  }
};

struct Problem {
  long B, N, C, D;
  TokenPool in;
  std::vector<double> x, codes, g, h;  // tokens, codebook, upstream of pooled and of weights
  std::vector<char> mask;
  std::vector<long> winners;
  std::vector<double> pooled, weights, d_tokens, d_codebook;
  double d_scale = 0;

  // Of a sample its scores, weights and gradients.
  void define() {
    pooled.assign(B * D, 0), weights.assign(B * C, 0), winners.assign(B * C, -1);
    d_tokens.assign(B * N * D, 0), d_codebook.assign(C * D, 0);
    for (long b = 0; b < B; ++b) sample(b);
  }

  double score(long b, long n, long c) const {
    double dot = 0;
    for (long d = 0; d < D; ++d) dot += x[(b * N + n) * D + d] * codes[c * D + d];
    return dot * in.scale;
  }

  void sample(long b) {
    std::vector<double> z(C, -kInf);
    bool tokens = false, padded = false;
    for (long n = 0; n < N; ++n) {
      const bool there = mask.empty() || mask[b * N + n];
      tokens |= there, padded |= !there;
      for (long c = 0; there && c < C; ++c) {
        const double s = score(b, n, c);
        if (s > z[c]) z[c] = s, winners[b * C + c] = n;
      }
    }
    if (!tokens && in.padded_score == -kInf) return;
    for (long c = 0; padded && c < C; ++c) {
      if (z[c] < in.padded_score) z[c] = in.padded_score, winners[b * C + c] = -1;
    }
    double* const w = weights.data() + b * C;
    normalize(z, w);
    double sum = 0;
    for (long c = 0; c < C; ++c) sum += w[c];
    gradients(b, w, in.normalize == Normalize::sigmoid ? sum : 1);
  }

  void normalize(const std::vector<double>& z, double* w) const {
    double top = -kInf, sum = 0;
    for (const double s : z) top = std::max(top, s);
    double low = top - 1, high = top;
    for (int i = 0; in.normalize == Normalize::sparsemax && i < 100; ++i) {
      const double middle = (low + high) / 2;
      double mass = 0;
      for (const double s : z) mass += std::max(s - middle, 0.0);
      (mass > 1 ? low : high) = middle;
    }
    for (const double s : z) sum += std::exp(s - top);
    for (long c = 0; c < C; ++c) {
      w[c] = in.normalize == Normalize::sparsemax ? std::max(z[c] - low, 0.0)
             : in.normalize == Normalize::softmax ? std::exp(z[c] - top) / sum
                                                  : 1 / (1 + std::exp(-z[c]));
    }
  }

  void gradients(long b, const double* w, double total) {
    std::vector<double> v(C), slope(C);
    double mean = 0, count = 0;
    for (long c = 0; c < C; ++c) {
      for (long d = 0; d < D; ++d) {
        pooled[b * D + d] += w[c] / total * codes[c * D + d];
        v[c] += g[b * D + d] * codes[c * D + d];
      }
      if (in.normalize == Normalize::sparsemax) {
        if (w[c] > 0) v[c] += h[b * C + c], mean += v[c], ++count;
      } else if (in.normalize == Normalize::softmax) {
        v[c] += h[b * C + c], mean += w[c] * v[c];
      } else {
        mean += w[c] * v[c] / total;
      }
    }
    if (count > 0) mean /= count;
    for (long c = 0; c < C; ++c) {
      slope[c] = in.normalize == Normalize::sparsemax ? (w[c] > 0 ? v[c] - mean : 0)
                 : in.normalize == Normalize::softmax
                     ? w[c] * (v[c] - mean)
                     : w[c] * (1 - w[c]) * ((v[c] - mean) / total + h[b * C + c]);
      const long n = winners[b * C + c];
      for (long d = 0; d < D; ++d) {
        d_codebook[c * D + d] += w[c] / total * g[b * D + d];
        if (n < 0) continue;
        d_codebook[c * D + d] += slope[c] * in.scale * x[(b * N + n) * D + d];
        d_tokens[(b * N + n) * D + d] += slope[c] * in.scale * codes[c * D + d];
      }
      if (n >= 0) d_scale += slope[c] * score(b, n, c) / in.scale;
    }
  }
};

void compare(const char* name, const Output& got, const std::vector<double>& want, double eps) {
  double size = 1;
  for (const double v : want) size = std::max(size, std::abs(v));
  for (long i = 0; i < got.view.rows; ++i) {
    for (long j = 0; j < got.view.cols; ++j) {
      const double value = got.at(i, j), exact = want[i * got.view.cols + j];
      CHECK(std::abs(value - exact) <= eps * size, "%s[%ld, %ld] of %ld x %ld is %g, not %g", name,
            i, j, got.view.rows, got.view.cols, value, exact);
    }
  }
  got.check_marks();
}

void check_once(int threads) {
  const Type types[] = {Type::f32, Type::f64, Type::bf16, Type::f16};
  const Type type = types[integer(0, 3)], wide = type == Type::f64 ? Type::f64 : Type::f32;
  const int size = size_of(type);
  Problem p;
  p.B = integer(1, 6), p.N = integer(1, integer(0, 3) ? 9 : 130);
  p.C = integer(1, integer(0, 3) ? 40 : 600), p.D = integer(1, integer(0, 3) ? 20 : 150);
  const auto [B, N, C, D] = std::tuple{p.B, p.N, p.C, p.D};
  // quarters: exact products and sums, and ties
  const auto value = [](long, long) { return std::nearbyint(4 * normal()) / 4; };
  const Input tokens(type, B, N * D, value), codes(type, C, D, value);
  p.x = tokens.values, p.codes = codes.values;
  const Normalize ways[] = {Normalize::sparsemax, Normalize::softmax, Normalize::sigmoid};
  // no fractions of a power of two: a score never stands on the threshold of sparsemax
  const double padded[] = {-kInf, 0.0, 0.5}, scales[] = {1e-5, 0.2317, 0.9173};
  p.in = {tokens.view,         codes.view, scales[integer(0, 2)],
          ways[integer(0, 2)], {},         padded[integer(0, 2)]};
  if (integer(0, 1)) {
    for (long i = 0; i < B * N; ++i) p.mask.push_back(char(integer(0, 3) > 0));
    for (long n = 0; n < N; ++n) p.mask[n] &= char(integer(0, 1) * (B > 1));
    p.in.mask = {p.mask.data(), B, N, N, 1, Type::b8};
  }
  Output pooled(type, B, D, size), weights(wide, B, C, size_of(wide)), winners(Type::i32, B, C, 4);
  Output d_tokens(type, B, N * D, size), d_codebook(type, C, D, size);
  Output g(type, B, D, size), h(wide, B, C, size_of(wide));
  for (auto [out, values] : {std::pair{&g, &p.g}, {&h, &p.h}}) {
    for (long i = 0; i < out->view.rows * out->view.cols; ++i) {
      values->push_back(value(0, 0));
      put(out->view.type, out->bytes.data() + i * size_of(out->view.type), values->back());
    }
  }
  p.define();
  const Run run{threads, {}};
  fdt_pool_forward(p.in, pooled.view, weights.view, winners.view, run);
  const double d_scale = fdt_pool_backward(p.in, g.view, h.view, weights.view, winners.view,
                                           d_tokens.view, d_codebook.view, true, run);
  for (long i = 0; i < B * C; ++i) {
    const long won = winners.view.at<int32_t>(i / C, i % C);
    CHECK(won == p.winners[i], "code %ld of sample %ld: %ld, not %ld", i % C, i / C, won,
          p.winners[i]);
  }
  winners.check_marks();
  const double inner = type == Type::f64 ? 1e-11 : 2e-5;
  const double outer = type == Type::bf16 ? 0x1p-7 : type == Type::f16 ? 0x1p-10 : inner;
  compare("weights", weights, p.weights, inner);
  compare("pooled", pooled, p.pooled, outer);
  compare("d_tokens", d_tokens, p.d_tokens, outer);
  compare("d_codebook", d_codebook, p.d_codebook, outer);
  double terms = 1;
  for (long i = 0; i < B * N * D; ++i) terms += std::abs(p.d_tokens[i] * p.x[i]) / p.in.scale;
  CHECK(std::abs(d_scale - p.d_scale) <= inner * terms, "d_scale %g, not %g", d_scale, p.d_scale);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 150;
  for (const auto& level : isa_levels()) {
    set_isa(level);
    for (int i = 0; i < rounds; ++i) check_once(1 + i % 3);
    std::printf("%s: %d cases\n", level.c_str(), rounds);
  }
}

// sample_negatives on random shapes, types and ids, at every level, against the definition in
// double: whatever is drawn is the best but for rounding, and never a pair left out.
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

// Word `j` % 4 of the counter (j / 4, i, 0, 0), as the paper writes it down.
uint32_t word(uint64_t seed, uint32_t i, uint32_t j) {
  uint32_t x[4] = {j / 4, i, 0, 0}, key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = uint64_t{x[0]} * 0xD2511F53u, q = uint64_t{x[2]} * 0xCD9E8D57u;
    const uint32_t y[4] = {uint32_t(q >> 32) ^ x[1] ^ key[0], uint32_t(q),
                           uint32_t(p >> 32) ^ x[3] ^ key[1], uint32_t(p)};
    std::memcpy(x, y, sizeof(x));
    key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
  }
  return x[j % 4];
}

void check_once(int threads) {
  const Type types[] = {Type::f32, Type::f64, Type::bf16, Type::f16};
  const Type type = types[integer(0, 3)];
  const long N = integer(1, integer(0, 3) ? 40 : 420), M = integer(1, integer(0, 3) ? 40 : 420);
  const long D = integer(1, integer(0, 3) ? 20 : 150);
  const auto value = [](long, long) { return normal(); };
  const Input q(type, N, D, value), k(type, M, D, value);
  std::vector<int64_t> q_ids(N), k_ids(M), drawn(N + 8, 77);
  const long kinds = integer(1, 4);
  for (auto* ids : {&q_ids, &k_ids}) {
    for (auto& id : *ids) id = (int64_t{1} << 61) * integer(-kinds, kinds - 1);
  }
  const uint64_t seed = testing::random()();
  const Pairs pairs{q.view,
                    k.view,
                    normal() * (integer(0, 3) ? 1 : 20),
                    {q_ids.data(), N, 1, 1, 1, Type::i64},
                    {k_ids.data(), M, 1, 1, 1, Type::i64},
                    {}};
  sample_negatives(pairs, seed, {drawn.data(), N, 1, 1, 1, Type::i64}, Run{threads, {}});
  for (long i = N; i < N + 8; ++i) CHECK(drawn[i] == 77);
  const double eps = type == Type::f64 ? 1e-15 : 2e-7;
  for (long i = 0; i < N; ++i) {
    double best = -kInf, got = -kInf, size = 1;
    for (long j = 0; j < M; ++j) {
      if (q_ids[i] == k_ids[j]) continue;
      double dot = 0, terms = 0;
      for (long d = 0; d < D; ++d) {
        const double term = q.values[i * D + d] * k.values[j * D + d];
        dot += term, terms += std::abs(term);
      }
      const double v = (word(seed, i, j) + 0.5) * 0x1p-32;
      const double sum = pairs.scale * dot - std::log(-std::log1p(-v));
      best = std::max(best, sum);
      size = std::max(size, std::abs(pairs.scale) * terms);
      if (j == drawn[i]) got = sum;
    }
    CHECK((best == -kInf) == (drawn[i] == -1), "row %ld drew %ld", i, long(drawn[i]));
    CHECK(best == got || best - got <= 8 * eps * size,
          "row %ld of %ld x %ld x %ld, type %d: column %ld is %g below the best", i, N, M, D,
          int(type), long(drawn[i]), best - got);
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

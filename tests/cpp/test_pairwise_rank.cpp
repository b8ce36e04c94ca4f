// pairwise_rank on random shapes, types and ids, at every level, against plain loops in double.
// Half of the inputs are whole numbers: products are exact, and many tie.
#include <cmath>
#include <limits>
#include <vector>

#include "../../csrc/levels.h"
#include "../../csrc/ops.h"
#include "values.h"

using namespace mmfast;
using namespace mmfast::testing;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

template <class T>
void check_as(Type type, int threads) {
  const bool whole = integer(0, 1), with_ids = integer(0, 1), with_threshold = integer(0, 3);
  const long N = integer(1, integer(0, 3) ? 40 : 420), M = integer(1, integer(0, 3) ? 40 : 420);
  const long D = integer(1, integer(0, 3) ? 9 : 150);
  const auto value = [&](long, long) { return whole ? double(integer(-2, 2)) : normal(); };
  const Input q(type, N, D, value), k(type, M, D, value);
  std::vector<int64_t> q_ids(N), k_ids(M), index(N + 8, 77), above(N + 8, 77);
  const long kinds = integer(1, 4);
  for (auto* ids : {&q_ids, &k_ids}) {
    for (auto& id : *ids) id = (int64_t{1} << 61) * integer(-kinds, kinds - 1);
  }
  std::vector<T> threshold(N), largest(N + 8, T(77));
  for (T& t : threshold) t = T(whole ? integer(-6, 6) : normal());
  const Type wide = sizeof(T) == 8 ? Type::f64 : Type::f32;
  Pairs pairs{q.view, k.view, 1, {}, {}, {}};
  if (with_ids) {
    pairs.q_ids = {q_ids.data(), N, 1, 1, 1, Type::i64};
    pairs.k_ids = {k_ids.data(), M, 1, 1, 1, Type::i64};
  }
  pairwise_rank(pairs, with_threshold ? View{threshold.data(), N, 1, 1, 1, wide} : View{},
                {largest.data(), N, 1, 1, 1, wide}, {index.data(), N, 1, 1, 1, Type::i64},
                {above.data(), N, 1, 1, 1, Type::i64}, Run{threads, {}});
  for (long i = N; i < N + 8; ++i) CHECK(largest[i] == 77 && index[i] == 77 && above[i] == 77);
  for (long i = 0; i < N; ++i) {
    std::vector<double> scores(M, -kInf);
    double best = -kInf, size = 1;
    long first = -1;
    for (long j = 0; j < M; ++j) {
      if (with_ids && q_ids[i] == k_ids[j]) continue;
      double dot = 0, terms = 0;
      for (long d = 0; d < D; ++d) {
        const double term = q.values[i * D + d] * k.values[j * D + d];
        dot += term, terms += std::abs(term);
      }
      scores[j] = dot;
      size = std::max(size, terms);
      if (dot > best) best = dot, first = j;
    }
    const double off = whole ? 0 : (sizeof(T) == 8 ? 1e-15 : 3e-7) * size;
    CHECK((first < 0) == (index[i] < 0), "row %ld", i);
    if (first >= 0) {
      CHECK(std::abs(largest[i] - best) <= off && scores[index[i]] >= best - 2 * off, "row %ld", i);
      CHECK(!whole || index[i] == first, "row %ld: %ld, not %ld", i, long(index[i]), first);
    } else {
      CHECK(largest[i] == -kInf && above[i] == 0);
    }
    int64_t least = 0, most = 0;
    for (long j = 0; with_threshold && j < M; ++j) {
      least += scores[j] > threshold[i] + off;
      most += scores[j] > threshold[i] - off;
    }
    CHECK(least <= above[i] && above[i] <= most, "row %ld: %ld, not %ld to %ld", i, long(above[i]),
          long(least), long(most));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 200;
  for (const auto& level : isa_levels()) {
    set_isa(level);
    for (int i = 0; i < rounds; ++i) {
      const Type types[] = {Type::f32, Type::bf16, Type::f16};
      i % 4 ? check_as<float>(types[i % 4 - 1], 1 + i % 3) : check_as<double>(Type::f64, 1 + i % 3);
    }
    std::printf("%s: %d cases\n", level.c_str(), rounds);
  }
}

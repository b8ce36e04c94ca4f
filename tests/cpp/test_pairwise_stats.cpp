// pairwise_stats on random shapes, types and edges, at every level, against plain loops in double.
// Half of the inputs are whole numbers: products are exact, fall on edges and tie.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../../csrc/levels.h"
#include "../../csrc/ops.h"
#include "values.h"

using namespace mmfast;
using namespace mmfast::testing;

namespace {

struct Product {
  double value;
  long row, column;
};

void check_once(int threads) {
  const Type types[] = {Type::f32, Type::f64, Type::bf16, Type::f16};
  const Type type = types[integer(0, 3)];
  const bool whole = integer(0, 1), distinct = integer(0, 1), binned = integer(0, 3);
  const long N = integer(1, integer(0, 3) ? 40 : 520), D = integer(1, integer(0, 3) ? 9 : 150);
  const long M = distinct ? N : integer(1, integer(0, 3) ? 40 : 420);
  const auto value = [&](long i, long) {
    // the helper that writes float16 knows no NaN
    if (whole && type != Type::f16 && i % 50 == 7) return std::nan("");
    return whole ? double(integer(-2, 2)) : normal();
  };
  const Input x(type, N, D, value), y(type, M, D, value);
  const Input& other = distinct ? x : y;

  std::vector<Product> products;
  double size = 1;
  for (long i = 0; i < N; ++i) {
    for (long j = distinct ? i + 1 : 0; j < M; ++j) {
      double dot = 0, terms = 0;
      for (long d = 0; d < D; ++d) {
        const double term = x.values[i * D + d] * other.values[j * D + d];
        dot += term, terms += std::abs(term);
      }
      if (dot != dot) continue;
      products.push_back({dot, i, j});
      size = std::max(size, terms);
    }
  }

  const long bins = integer(1, integer(0, 1) ? 5 : 700);
  std::vector<double> edges(bins + 1);
  const double low = whole ? -integer(1, 6) : -2.3, high = whole ? integer(1, 9) : 1.9;
  for (long b = 0; b <= bins; ++b) edges[b] = low + (high - low) * b / bins;
  edges[bins] = high;
  const long slots = binned ? bins + 2 : 1;
  std::vector<int64_t> counts(slots + 8, 77);
  const double pivot = float(normal());
  const View bounds = binned ? View{edges.data(), bins + 1, 1, 1, 1, Type::f64} : View{};
  const PairStats got =
      pairwise_stats(x.view, distinct ? View{} : y.view, bounds, pivot,
                     {counts.data(), slots, 1, 1, 1, Type::i64}, Run{threads, {}});

  for (long b = slots; b < slots + 8; ++b) CHECK(counts[b] == 77);
  int64_t total = 0;
  for (long b = 0; b < slots; ++b) total += counts[b];
  CHECK(total == int64_t(products.size()), "%ld of %zu", long(total), products.size());
  if (products.empty()) {
    CHECK(got.least.row == -1 && got.largest.row == -1);
    return;
  }
  const double off = whole ? 0 : (type == Type::f64 ? 1e-15 : 3e-7) * size;
  for (const double sign : {1.0, -1.0}) {
    const Extreme& e = sign > 0 ? got.least : got.largest;
    double best = std::numeric_limits<double>::infinity(), found = best;
    Product first{};
    for (const Product& p : products) {
      if (sign * p.value < best) best = sign * p.value, first = p;
      if (p.row == e.row && p.column == e.column) found = sign * p.value;
    }
    CHECK(std::abs(sign * e.value - best) <= off && std::abs(found - best) <= 2 * off);
    if (whole) CHECK(e.row == first.row && e.column == first.column);
  }
  for (int p = 1; p <= 4; ++p) {
    // a plain sum of so many equal terms has more rounding than the one it judges
    long double sum = 0, each = 0;
    for (const Product& product : products) {
      const double power = std::pow(product.value - pivot, p);
      sum += power;
      each += std::abs(power) * 1e-13;
      each += p * std::pow(std::abs(product.value - pivot) + off, p - 1) * off;
    }
    CHECK(std::abs(got.powers[p - 1] - sum) <= each, "power %d: %g, not %Lg", p, got.powers[p - 1],
          sum);
  }
  // how many lie below an edge, or on it for the last one, but for those within the error
  int64_t below = 0;
  for (long b = 0; binned && b <= bins; ++b) {
    below += counts[b];
    int64_t least = 0, most = 0;
    for (const Product& p : products) {
      const bool closed = b == bins && p.value == edges[b];
      least += p.value < edges[b] - off || (off == 0 && closed);
      most += p.value < edges[b] + off || closed;
    }
    CHECK(least <= below && below <= most, "edge %ld: %ld, not %ld to %ld", b, long(below),
          long(least), long(most));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 120;
  for (const auto& level : isa_levels()) {
    set_isa(level);
    for (int i = 0; i < rounds; ++i) check_once(1 + i % 3);
    std::printf("%s: %d cases\n", level.c_str(), rounds);
  }
}

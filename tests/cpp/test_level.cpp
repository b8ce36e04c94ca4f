// What a level's headers compute: exponentials, softplus, angles, row sums, half types, the tile's
// product, noise.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "../../csrc/cpu/noise.h"
#include "../../csrc/cpu/sweep.h"
#include "../../csrc/cpu/trig.h"
#include "../../csrc/slerp.h"
#include "check.h"

namespace mmfast::MMFAST_LEVEL {
namespace {

using testing::integer;
using testing::normal;

template <class T, int kDegree>
void check_exp2(double tolerance) {
  const T lowest = sizeof(T) == 8 ? -1022 : -126;
  for (double x = lowest + 1; x <= 120; x += 0.0137) {
    const T at = T(x);
    const T y = exp2<kDegree, T>(broadcast(at))[0];
    const double exact = std::exp2(double(at));
    CHECK(std::abs(y - exact) <= tolerance * exact, "2^%g = %g, got %g", x, exact, double(y));
  }
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  CHECK((exp2<kDegree, T>(broadcast(T(lowest - 2)))[0] <= std::exp2(lowest)));
  for (const T x : {-inf, T(lowest * 30)}) {
    CHECK((exp2<kDegree, T>(broadcast(x))[kWidth<T> - 1] == 0), "2^%g", double(x));
  }
  for (const T x : {T(2 - lowest), T(3.7) - lowest * 3, -lowest * 1000}) {
    const T y = exp2<kDegree, T>(broadcast(x))[1];
    CHECK(!(y < std::numeric_limits<T>::max() * T(0.999)), "2^%g = %g", double(x), double(y));
  }
  // NaN stays in its lane
  Vec<T> mixed = broadcast(T(1));
  mixed[0] = nan;
  mixed = exp2<kDegree, T>(mixed);
  CHECK(std::isnan(mixed[0]) && std::abs(mixed[1] - 2) < 1e-3);
  CHECK((larger<T>(broadcast(nan), broadcast(T(3)))[0] == 3));
}

// Within `units` of the last place of `exact`, or within `floor`.
template <class T>
void check_near(T y, long double exact, double units, long double floor, T x, const char* name) {
  const T near = std::abs(T(exact)), above = std::nextafter(near, T(10));
  CHECK(std::abs(y - exact) <= std::max(units * (long double)(above - near), floor),
        "%s %.17g = %.17Lg, got %.17g", name, double(x), exact, double(y));
}

template <class T>
void check_angles() {
  using Maths = Lanes<T>;
  const auto check_wave = [](T x, double units, long double floor) {
    // in one lane, beside some that need no reduction
    Vec<T> mixed = broadcast(T(0));
    mixed[1] = x;
    const Vec<T> sine = Maths::sin(mixed), cosine = Maths::cos(mixed);
    check_near<T>(sine[1], std::sin((long double)x), units, floor, x, "sin");
    check_near<T>(cosine[1], std::cos((long double)x), units, floor, x, "cos");
    CHECK(sine[0] == 0 && cosine[0] == 1, "beside %g", double(x));
  };
  for (double x = -10; x <= 10; x += 0.00137) check_wave(T(x), 2, 0);
  // near a multiple of pi/2 the last of its digits count
  const long double floor = sizeof(T) == 4 ? 1e-9 : 1e-18;
  for (int i = 0; i < 20000; ++i) check_wave(T(integer(-16384000, 16384000) / 1e3), 3, floor);
  for (double x = 16384; x < 1e30; x *= -1.37) check_wave(T(x), 2, 0);

  const auto check_acos = [](T x) {
    check_near<T>(Maths::acos(broadcast(x))[1], std::acos((long double)x), 2, 0, x, "acos");
  };
  for (double x = -1; x <= 1; x += 0.000137) check_acos(T(x));
  for (double x = 1; x > 1e-20; x *= 0.99) {
    for (const T near : {T(1 - x), T(x - 1), T(x), T(-x)}) check_acos(near);
  }
  CHECK(Maths::acos(broadcast(T(1)))[0] == 0);

  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  for (const T x : {inf, -inf, nan}) {
    Vec<T> mixed = broadcast(T(1));
    mixed[0] = x;
    const Vec<T> found[] = {Maths::sin(mixed), Maths::cos(mixed), Maths::acos(mixed)};
    for (const Vec<T>& y : found) CHECK(std::isnan(y[0]) && !std::isnan(y[1]), "%g", double(x));
  }
}

// one copy in the code, as in the op: where products are summed, each may be fused in its own way
template <class T>
[[gnu::noinline]] void weigh(Vec<T> c, Vec<T> lam, Vec<T>* out) {
  const slerp::Angle<Lanes<T>> angle(c);
  out[0] = angle.weight(lam);
  out[1] = angle.weight_by_lam(lam);
  out[2] = angle.weight_by_c(lam);
}

// The weights of a row have the same bits whichever rows stand beside it.
template <class T>
void check_rows_alone() {
  for (int round = 0; round < 2000; ++round) {
    Vec<T> c, lam, mixed[3], alone[3];
    for (int i = 0; i < kWidth<T>; ++i) {
      c[i] = T(integer(-11, 11) / 10.0), lam[i] = T(0.5 + normal());
      if (integer(0, 9) == 0) lam[i] *= T(1e6);
    }
    weigh<T>(c, lam, mixed);
    for (int i = 0; i < kWidth<T>; ++i) {
      weigh<T>(broadcast(c[i]), broadcast(lam[i]), alone);
      for (int k = 0; k < 3; ++k) {
        CHECK(mixed[k][i] == alone[k][0], "%d: c = %g, lam = %g", k, double(c[i]), double(lam[i]));
      }
    }
  }
}

template <class T>
void check_softplus2(double tolerance) {
  const double lowest = sizeof(T) == 8 ? -1022 : -126;
  Softplus2<T> many;
  double sum = 0;
  int terms = 0;
  for (double x = lowest + 1; x <= 1 - lowest; x += 0.0137) {
    const T at = T(x);
    Softplus2<T> one;
    const T slope = one.add(broadcast(at))[0], value = one.value()[0];
    const double power = std::exp2(-std::abs(double(at)));
    const double exact = std::max<double>(at, 0) + std::log1p(power) * kLog2e;
    const double exact_slope = (at > 0 ? 1 : power) / (1 + power);
    CHECK(std::abs(value - exact) <= tolerance * exact, "at %g: %g", x, double(value));
    CHECK(std::abs(slope - exact_slope) <= tolerance * exact_slope, "at %g: %g", x, double(slope));
    many.add(one);
    sum += exact;
    if (++terms == 60) {
      CHECK(std::abs(many.value()[0] - sum) <= 4 * tolerance * sum, "to %g: %g", x, sum);
      many = {}, sum = 0, terms = 0;
    }
  }
  Vec<T> odd = {-kInf<T>, kInf<T>};
  Softplus2<T> ends;
  const Vec<T> at_ends = ends.add(odd);
  CHECK(ends.value()[0] == 0 && at_ends[0] == 0);
  CHECK(ends.value()[1] == kInf<T> && at_ends[1] == 1);
  // NaN stays in its lane
  odd[0] = std::numeric_limits<T>::quiet_NaN(), odd[1] = 0;
  Softplus2<T> mixed;
  const Vec<T> slopes = mixed.add(odd);
  CHECK(std::isnan(mixed.value()[0]) && std::isnan(slopes[0]));
  CHECK(std::abs(mixed.value()[1] - 1) < 1e-6 && std::abs(slopes[1] - T(0.5)) < 1e-6);
}

template <class T>
void check_sums() {
  Vec<T> rows[kWidth<T>];
  T expected[kWidth<T>] = {};
  for (int i = 0; i < kWidth<T>; ++i) {
    for (int j = 0; j < kWidth<T>; ++j) {
      rows[i][j] = T(integer(-50, 50));
      expected[i] += rows[i][j];
    }
  }
  const Vec<T> sums = sums_of<T>(rows);
  for (int i = 0; i < kWidth<T>; ++i) CHECK(sums[i] == expected[i], "row %d", i);
  CHECK(sum_of_lanes<T>(sums) == std::accumulate(expected, expected + kWidth<T>, 0.0));
}

template <class T>
void check_transpose() {
  Vec<T> rows[kWidth<T>];
  for (int i = 0; i < kWidth<T>; ++i) {
    for (int j = 0; j < kWidth<T>; ++j) rows[i][j] = T(i * 100 + j);
  }
  transpose<T>(rows);
  for (int i = 0; i < kWidth<T>; ++i) {
    for (int j = 0; j < kWidth<T>; ++j) CHECK(rows[i][j] == T(j * 100 + i), "%d %d", i, j);
  }
}

double f16_value(uint32_t h) {
  const int exponent = (h >> 10) & 31;
  const double mantissa = h & 1023;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}

void check_half_types() {
  for (uint32_t h = 0; h < 65536; ++h) {
    const float wide = float_of_f16(h);
    if (((h >> 10) & 31) == 31) {
      CHECK((h & 1023) ? std::isnan(wide) : std::isinf(wide), "%x", h);
      CHECK((h & 1023) ? std::isnan(float_of_f16(f16_of_float(wide))) : f16_of_float(wide) == h);
    } else {
      CHECK(wide == f16_value(h), "%x", h);
      CHECK(f16_of_float(wide) == h, "%x", h);
      // halfway to the next one goes to the even one, and a little more or less to the nearest
      if (((h + 1) & 0x7fff) < 0x7c00 && (h & 0x7fff) != 0x7bff) {
        const double middle = (f16_value(h) + f16_value(h + 1)) / 2;
        CHECK(f16_of_float(float(middle)) == (h % 2 ? h + 1 : h), "above %x", h);
        CHECK(f16_of_float(std::nextafter(float(middle), float(f16_value(h)))) == h, "%x", h);
      }
    }
    const float brain = float_of_bf16(h);
    if (std::isnan(brain)) {
      CHECK(std::isnan(float_of_bf16(bf16_of_float(brain))), "%x", h);
    } else {
      CHECK(bf16_of_float(brain) == h, "%x", h);
    }
  }
  CHECK(std::isinf(float_of_f16(f16_of_float(65520.f))) && f16_of_float(65519.f) == 0x7bff);
  CHECK(bf16_of_float(1.00390625f) == 0x3f80 && bf16_of_float(1.01171875f) == 0x3f82);  // to even
}

template <class P, Stride kStride>
void check_product() {
  using T = typename P::Scalar;
  using Unit = typename P::Unit;
  for (int round = 0; round < 20; ++round) {
    const long rows = integer(1, 40), cols = integer(1, 150), depth = integer(1, 60);
    const long room = round_up(cols, kWidth<T>);
    const long a_stride = kStride == Stride::rows ? depth + integer(0, 3) : rows + kTileRows;
    const long a_lines = kStride == Stride::rows ? rows + kTileRows : depth;
    std::vector<Unit> a(a_lines * a_stride + kTileRows), b(depth * room);
    std::vector<T> c(rows * room), expected;
    for (auto& x : a) x = Unit(integer(-4, 4));
    for (auto& x : b) x = Unit(integer(-4, 4));
    for (auto& x : c) x = T(integer(-4, 4));
    expected = c;
    for (long i = 0; i < rows; ++i) {
      for (long j = 0; j < room; ++j) {
        for (long p = 0; p < depth; ++p) {
          const Unit x = kStride == Stride::rows ? a[i * a_stride + p] : a[p * a_stride + i];
          expected[i * room + j] += T(x) * T(b[p * room + j]);
        }
      }
    }
    add_product<P, kStride>(rows, cols, depth, {a.data(), a_stride}, {b.data(), room},
                            {c.data(), room});
    CHECK(c == expected, "rows %ld, cols %ld, depth %ld", rows, cols, depth);
  }
}

// Random123's kat_vectors, in every lane, whatever stands in the upper halves.
void check_philox() {
  struct {
    uint64_t counter[4], key, words[4];
  } const known[] = {
      {{0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{~0ull, ~0ull, ~0ull, ~0ull}, ~0ull, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       0x299f31d0a4093822,
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  constexpr int kLanes = kWidth<double>;
  const Words zero = {};
  for (const auto& k : known) {
    const auto& c = k.counter;
    const Quad words = philox({zero + c[0], zero + c[1], zero + c[2], zero + c[3]}, k.key);
    uint32_t across[4 * kLanes], down[4 * kLanes];
    store_across(words, across);
    store_down(words, down, kLanes);
    for (int l = 0; l < 4 * kLanes; ++l) {
      CHECK(across[l] == k.words[l % 4] && down[l] == k.words[l / kLanes], "%d", l);
    }
  }
  Quad mixed = {zero, zero, zero, zero};
  for (int l = 0; l < kLanes; ++l) mixed.a[l] = l;
  uint32_t across[4 * kLanes];
  store_across(philox(mixed, 5), across);
  for (uint64_t l = 0; l < kLanes; ++l) {
    uint32_t alone[4 * kLanes];
    store_across(philox({zero + l, zero, zero, zero}, 5), alone);
    CHECK(!std::memcmp(across + 4 * l, alone, 16), "counter %d", int(l));
  }
}

// A bound of the noise, tight where the noise is large.
void check_gumbel() {
  for (int i = 0; i < 200000; ++i) {
    const uint32_t word = i < 70000 ? i : i < 140000 ? -uint32_t(i - 69999) : testing::random()();
    const double above = gumbel_bound(word) - gumbel(word);
    CHECK(above > -2e-5, "word %u: %g", word, above);
    CHECK(word < 64 || word > 1 << 24 || above < 0.1, "word %u: %g", word, above);
  }
  CHECK(std::abs(gumbel(0) - 33 * std::log(2)) < 1e-9);
  CHECK(std::abs(gumbel(~0u) + std::log(33 * std::log(2))) < 1e-9);
}

}  // namespace

void test() {
  check_exp2<float, 3>(8e-5);
  check_exp2<float, 4>(3e-6);
  check_exp2<float, 5>(3e-7);
  check_exp2<double, 11>(5e-16);
  check_softplus2<float>(4e-7);
  check_softplus2<double>(1e-15);
  check_angles<float>();
  check_angles<double>();
  check_rows_alone<float>();
  check_rows_alone<double>();
  check_sums<float>();
  check_sums<double>();
  check_transpose<float>();
  check_transpose<double>();
  check_half_types();
  check_philox();
  check_gumbel();
  check_product<F32, Stride::rows>();
  check_product<F32, Stride::depth>();
  check_product<F64, Stride::rows>();
  check_product<F64, Stride::depth>();
}

}  // namespace mmfast::MMFAST_LEVEL

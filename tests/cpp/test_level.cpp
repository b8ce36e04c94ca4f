// What a level's headers compute: exponentials, row sums, half types, the tile's product.
#include <cmath>
#include <vector>

#include "../../csrc/cpu/sweep.h"
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

}  // namespace

void test() {
  check_exp2<float, 3>(8e-5);
  check_exp2<float, 4>(3e-6);
  check_exp2<float, 5>(3e-7);
  check_exp2<double, 11>(5e-16);
  check_sums<float>();
  check_sums<double>();
  check_transpose<float>();
  check_transpose<double>();
  check_half_types();
  check_product<F32, Stride::rows>();
  check_product<F32, Stride::depth>();
  check_product<F64, Stride::rows>();
  check_product<F64, Stride::depth>();
}

}  // namespace mmfast::MMFAST_LEVEL

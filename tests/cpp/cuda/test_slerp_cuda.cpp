// csrc/cuda/slerp.cu, compiled for the emulator, against the formulas in double: every type and
// plan, ragged widths, odd strides and addresses, in every order of threads. Outputs lie between
// guard bytes.
#include <sys/mman.h>

#include <cmath>
#include <string>
#include <vector>

#include "../../../csrc/cuda/ops.h"
#include "arrays.h"

using namespace mmfast;
using namespace mmfast::testing;

namespace {

// half a unit in the last place of a result, and what the sums before it may lose
template <class T>
constexpr double kRounding = std::is_same_v<T, __nv_bfloat16> ? 0x1p-8
                             : std::is_same_v<T, __half>      ? 0x1p-11
                             : sizeof(T) == 8                 ? 1e-14
                                                              : 1e-6;
template <class T>
constexpr double kLoss = sizeof(T) == 8 ? 1e-13 : 1e-5;

// rows of length 0.9: the formulas of this test lose accuracy towards <a, b> = 1
template <class T>
void fill(Array<T>& x, long rows, long cols) {
  for (long i = 0; i < rows; ++i) {
    std::vector<double> row(cols);
    double squares = 0;
    for (double& v : row) {
      v = normal();
      squares += v * v;
    }
    for (long j = 0; j < cols; ++j) x.at(i, j) = rounded<T>(0.9 * row[j] / std::sqrt(squares));
  }
}

// sin(lam theta) / sin(theta) and its derivatives, as they stand in a textbook
struct Weight {
  double k, by_lam, by_c;
  Weight(double lam, double c) {
    const double theta = std::acos(c), s = std::sin(theta);
    k = std::sin(lam * theta) / s;
    by_lam = theta * std::cos(lam * theta) / s;
    by_c = -(lam * std::cos(lam * theta) * s - std::sin(lam * theta) * c) / (s * s * s);
  }
};

template <class T>
double dot(Array<T>& x, Array<T>& y, long i, long cols) {
  double sum = 0;
  for (long j = 0; j < cols; ++j) sum += x(i, j) * y(i, j);
  return sum;
}

template <class T>
void check_close(double got, double expected, double size, const std::string& where) {
  const double allowed = kRounding<T> * std::abs(expected) + kLoss<T> * size;
  CHECK(std::abs(got - expected) <= allowed, "%s: %.9g, expected %.9g", where.c_str(), got,
        expected);
}

template <class T>
void check(long rows, long cols, Layout layout, bool one_lam) {
  using W = std::conditional_t<sizeof(T) == 8, double, float>;
  char text[99];
  std::snprintf(text, sizeof(text), "[%ld, %ld] type %d layout %d", rows, cols, int(kType<T>),
                int(layout));
  const std::string where = text;
  Array<T> g(rows, cols, layout), a(rows, cols, layout), b(rows, cols, layout);
  Array<W> lam(one_lam ? 1 : rows, 1, layout);
  for (auto* x : {&g, &a, &b}) fill(*x, rows, cols);
  for (long i = 0; i < (one_lam ? 1 : rows); ++i) lam.at(i) = W(integer(-4, 20) / 16.0);
  View lam_view = lam.view();
  if (one_lam) lam_view.row_stride = 0;
  // each output asked for or not
  const int asked = int(integer(1, 7));
  std::vector<unsigned char> first[4];
  for (const auto order : emulator::kOrders) {
    emulator::order = order;
    Array<T> out(rows, cols, layout), da(rows, cols, layout), db(rows, cols, layout);
    Array<W> dlam(rows, 1, layout);
    cuda::slerp_forward(a.view(), b.view(), lam_view, out.view(), {});
    cuda::slerp_backward(g.view(), a.view(), b.view(), lam_view, asked & 1 ? da.view() : View{},
                         asked & 2 ? db.view() : View{}, asked & 4 ? dlam.view() : View{}, {});
    // the same bits in every order
    const std::vector<unsigned char>* results[] = {&out.bytes(), &da.bytes(), &db.bytes(),
                                                   &dlam.bytes()};
    if (order != emulator::Order::forward) {
      for (int r = 0; r < 4; ++r) CHECK(*results[r] == first[r], "%s", where.c_str());
      continue;
    }
    for (int r = 0; r < 4; ++r) first[r] = *results[r];
    for (auto* x : {&out, &da, &db}) x->check_guards(where);
    dlam.check_guards(where);
    for (auto* x : {&da, &db}) {
      if (asked & (x == &da ? 1 : 2)) continue;
      for (const auto byte : x->bytes()) CHECK(byte == kGuard, "written though not asked for");
    }
    for (long i = 0; i < rows; ++i) {
      const double c = dot(a, b, i, cols), l = lam(one_lam ? 0 : i);
      const double g_a = dot(g, a, i, cols), g_b = dot(g, b, i, cols);
      const Weight k1(l, c), k2(1 - l, c);
      const double g_c = g_a * k1.by_c + g_b * k2.by_c;
      for (long j = 0; j < cols; ++j) {
        check_close<T>(out(i, j), k1.k * a(i, j) + k2.k * b(i, j), 1, where + " out");
        if (asked & 1) check_close<T>(da(i, j), k1.k * g(i, j) + g_c * b(i, j), 4, where + " da");
        if (asked & 2) check_close<T>(db(i, j), k2.k * g(i, j) + g_c * a(i, j), 4, where + " db");
      }
      if (asked & 4) {
        check_close<W>(dlam(i), g_a * k1.by_lam - g_b * k2.by_lam, 4, where + " dlam");
      }
    }
  }
}

template <class T>
void check_type() {
  for (const long cols : {1, 3, 8, 31, 64, 100, 511, 512, 1030}) {
    for (const auto layout :
         {Layout::tight, Layout::padded, Layout::odd_stride, Layout::odd_address}) {
      check<T>(cols > 100 ? 2 : 5, cols, layout, integer(0, 1));
    }
  }
  // one width for each plan, from a single pack to rows that no block can hold, and both lams
  const long pack = 16 / long(sizeof(T));
  for (const long packs : {1, 65, 129, 257, 513}) {
    for (const bool one_lam : {false, true}) check<T>(2, packs * pack, Layout::tight, one_lam);
  }
  // more rows than blocks: 16 of 4 rows, and 16 of one
  check<T>(70, 16, Layout::tight, false);
  check<T>(18, 300 * pack, Layout::tight, false);
}

// parallel rows by their limits, and NaN where it belongs
void check_extremes() {
  const long rows = 4, cols = 8;
  Array<float> a(rows, cols, Layout::tight), b(rows, cols, Layout::tight),
      out(rows, cols, Layout::tight), da(rows, cols, Layout::tight);
  Array<float> lam(rows, 1, Layout::tight), dlam(rows, 1, Layout::tight);
  for (long i = 0; i < rows; ++i) {
    lam.at(i) = 0.25f;
    for (long j = 0; j < cols; ++j) a.at(i, j) = b.at(i, j) = j == 0 ? 1.f : 0.f;
  }
  a.at(1, 3) = std::nanf("");
  b.at(2, 0) = -1;  // antipodal: large, not infinite
  b.at(3, 0) = 2;   // <a, b> = 2 counts as 1
  cuda::slerp_forward(a.view(), b.view(), lam.view(), out.view(), {});
  cuda::slerp_backward(a.view(), a.view(), b.view(), lam.view(), da.view(), {}, dlam.view(), {});
  for (long j = 0; j < cols; ++j) {
    CHECK(std::abs(out(0, j) - a(0, j)) < 1e-6 && std::isfinite(da(0, j)));
    CHECK(std::isfinite(out(2, j)) && std::isfinite(da(2, j)));
    CHECK(std::isnan(out(1, j)) && std::isnan(da(1, j)));
  }
  CHECK(std::abs(out(3, 0) - 1.75) < 1e-6 && std::isfinite(da(3, 0)));
  CHECK(std::isnan(dlam(1)) && std::abs(dlam(3) + 1) < 1e-6);
}

// rows more than 2^31 elements apart: nothing on the way may be 32 bits wide
void check_far_rows() {
  const long stride = (long{1} << 31) + 64, cols = 8;
  const size_t bytes = size_t(stride + 64) * sizeof(__half);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  CHECK(memory != MAP_FAILED);
  auto* x = static_cast<__half*>(memory);
  const auto view = [&](long offset) { return View{x + offset, 2, cols, stride, 1, Type::f16}; };
  const View a = view(0), b = view(8), out = view(16), da = view(24);
  for (long i = 0; i < 2; ++i) {
    a.at<__half>(i, i) = b.at<__half>(i, 2 + i) = rounded<__half>(1);
  }
  float half = 0.5f;
  const View lam{&half, 2, 1, 0, 1, Type::f32};
  cuda::slerp_forward(a, b, lam, out, {});
  cuda::slerp_backward(b, a, b, lam, da, {}, {}, {});
  for (long i = 0; i < 2; ++i) {
    // k1 = k2 = sin 45 degrees; da = (k1 + dk2/dc) b
    const double k = std::sqrt(0.5);
    CHECK(std::abs(value(out.at<__half>(i, i)) - k) < 1e-3);
    CHECK(std::abs(value(out.at<__half>(i, 2 + i)) - k) < 1e-3);
    CHECK(std::abs(value(da.at<__half>(i, 2 + i)) - k / 2) < 1e-3);
    CHECK(value(out.at<__half>(i, 1 - i)) == 0 && value(da.at<__half>(i, i)) == 0);
  }
  munmap(memory, bytes);
}

}  // namespace

int main() {
  check_type<float>();
  check_type<double>();
  check_type<__nv_bfloat16>();
  check_type<__half>();
  check_extremes();
  check_far_rows();
}

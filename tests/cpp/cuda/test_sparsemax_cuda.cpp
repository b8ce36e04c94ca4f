// csrc/cuda/sparsemax.cu, compiled for the emulator, against sorting in double: every type and
// plan, ragged widths, odd strides and addresses, in every order of threads. Outputs lie between
// guard bytes.
#include <sys/mman.h>

#include <cmath>
#include <string>
#include <vector>

#include "../../../csrc/cuda/ops.h"
#include "../sorted_weights.h"
#include "arrays.h"

using namespace mmfast;
using namespace mmfast::testing;

namespace {

// half a unit in the last place, and some for f32 sums of a few terms
template <class T>
constexpr double kRounding = std::is_same_v<T, __nv_bfloat16> ? 0x1.1p-8
                             : std::is_same_v<T, __half>      ? 0x1.1p-11
                             : sizeof(T) == 8                 ? 1e-13
                                                              : 3e-7;

template <class T>
class Problem {
 public:
  Problem(long rows, long cols, Layout layout, double spread)
      : rows_(rows), cols_(cols), layout_(layout), x_(rows, cols, layout), g_(rows, cols, layout) {
    for (long i = 0; i < rows; ++i) {
      for (long j = 0; j < cols; ++j) {
        // some equal entries, some left out
        const double v = integer(0, 3) ? spread * normal() : spread * integer(-2, 2);
        x_.at(i, j) = rounded<T>(integer(0, 9) ? v : -kInfinity);
        g_.at(i, j) = rounded<T>(normal());
      }
    }
    char text[99];
    std::snprintf(text, sizeof(text), "[%ld, %ld] type %d layout %d", rows, cols, int(kType<T>),
                  int(layout));
    where_ = text;
  }
  void check() {
    std::vector<unsigned char> first[2];
    for (const auto order : emulator::kOrders) {
      emulator::order = order;
      Array<T> p(rows_, cols_, layout_), dx(rows_, cols_, layout_);
      cuda::sparsemax_forward(x_.view(), p.view(), {});
      cuda::sparsemax_backward(g_.view(), p.view(), dx.view(), {});
      if (order == emulator::Order::forward) {
        first[0] = p.bytes(), first[1] = dx.bytes();
        p.check_guards(where_), dx.check_guards(where_);
        for (long i = 0; i < rows_; ++i) check_row(i, p, dx);
      }
      // the same bits in every order
      CHECK(p.bytes() == first[0] && dx.bytes() == first[1], "%s", where_.c_str());
    }
  }

 private:
  void check_row(long i, Array<T>& p, Array<T>& dx) {
    std::vector<double> row(cols_);
    for (long j = 0; j < cols_; ++j) row[j] = x_(i, j);
    const auto want = sorted_weights(row.data(), cols_);
    const double least = kType<T> == Type::f16 ? 0x1p-24 : 1e-12;
    double sum = 0, count = 0;
    for (long j = 0; j < cols_; ++j) {
      CHECK(std::abs(p(i, j) - want[j]) <= kRounding<T> * want[j] + least, "%s: %.9g, not %.9g",
            where_.c_str(), p(i, j), want[j]);
      const bool at_tau = sizeof(T) == 8 && std::max(p(i, j), want[j]) < 1e-13;
      CHECK((p(i, j) > 0) == (want[j] > 0) || at_tau, "%s: support", where_.c_str());
      if (p(i, j) > 0) sum += g_(i, j), count += 1;
    }
    for (long j = 0; j < cols_; ++j) {
      const double expected = p(i, j) > 0 ? g_(i, j) - sum / count : 0;
      CHECK(std::abs(dx(i, j) - expected) <= kRounding<T> * (8 + std::abs(expected)),
            "%s: dx %.9g, not %.9g", where_.c_str(), dx(i, j), expected);
    }
  }

  long rows_, cols_;
  Layout layout_;
  Array<T> x_, g_;
  std::string where_;
};

template <class T>
void check_type() {
  for (const long cols : {1, 3, 31, 100}) {
    for (const auto layout :
         {Layout::tight, Layout::padded, Layout::odd_stride, Layout::odd_address}) {
      Problem<T>(5, cols, layout, integer(0, 1) ? 0.5 : 0.01).check();
    }
  }
  // one width for each plan, from a single pack to rows that no block can hold
  const long pack = 16 / long(sizeof(T));
  for (const long packs : {1, 129, 513, sizeof(T) == 2 ? 2049 : 4097}) {
    Problem<T>(packs < 500 ? 2 : 1, packs * pack, Layout::tight, packs < 1000 ? 0.1 : 1e-3).check();
  }
  Problem<T>(1, 1100, Layout::odd_address, 0.05).check();
  // more rows than blocks: 16 of 4 rows
  Problem<T>(70, 16, Layout::tight, 1).check();
}

// NaN and infinities in their rows, in those of one warp and of several
void check_extremes(long cols) {
  const long rows = 6;
  Array<float> x(rows, cols, Layout::tight), p(rows, cols, Layout::tight),
      dx(rows, cols, Layout::tight);
  for (long i = 0; i < rows; ++i) {
    for (long j = 0; j < cols; ++j) x.at(i, j) = i == 2 || i == 4 ? -INFINITY : float(j % 3);
  }
  x.at(1, cols - 1) = std::nanf("");
  x.at(3, 0) = INFINITY;
  x.at(4, cols / 2) = std::nanf("");
  cuda::sparsemax_forward(x.view(), p.view(), {});
  cuda::sparsemax_backward(x.view(), p.view(), dx.view(), {});
  for (long j = 0; j < cols; ++j) {
    for (const long i : {1, 3, 4}) CHECK(std::isnan(p(i, j)) && std::isnan(dx(i, j)));
    CHECK(p(2, j) == 0 && dx(2, j) == 0);
    for (const long i : {0, 5}) CHECK((p(i, j) > 0) == (j % 3 == 2) && dx(i, j) == 0);
  }
}

// rows more than 2^31 elements apart: nothing on the way may be 32 bits wide
void check_far_rows() {
  const long stride = (long{1} << 31) + 64, cols = 8;
  const size_t bytes = size_t(stride + 64) * sizeof(__half);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  CHECK(memory != MAP_FAILED);
  auto* data = static_cast<__half*>(memory);
  const auto view = [&](long offset) { return View{data + offset, 2, cols, stride, 1, Type::f16}; };
  const View x = view(0), p = view(8), dx = view(16);
  for (long i = 0; i < 2; ++i) x.at<__half>(i, i) = rounded<__half>(2);
  cuda::sparsemax_forward(x, p, {});
  cuda::sparsemax_backward(x, p, dx, {});
  for (long i = 0; i < 2; ++i) {
    for (long j = 0; j < cols; ++j) {
      CHECK(value(p.at<__half>(i, j)) == (i == j) && value(dx.at<__half>(i, j)) == 0);
    }
  }
  munmap(memory, bytes);
}

}  // namespace

int main() {
  check_type<float>();
  check_type<double>();
  check_type<__nv_bfloat16>();
  check_type<__half>();
  check_extremes(8);
  check_extremes(3000);
  check_far_rows();
}

#pragma once
#include <string>
#include <type_traits>
#include <vector>

#include "../../../csrc/view.h"
#include "../check.h"
#include "emulated_cuda.h"

// Matrices of a kernel's types, with guard bytes around them.
namespace mmfast::testing {

template <class T>
constexpr Type kType = Type::f32;
template <>
constexpr Type kType<double> = Type::f64;
template <>
constexpr Type kType<__nv_bfloat16> = Type::bf16;
template <>
constexpr Type kType<__half> = Type::f16;

inline double value(float x) { return x; }
inline double value(double x) { return x; }
inline double value(__nv_bfloat16 x) { return __bfloat162float(x); }
inline double value(__half x) { return __half2float(x); }

template <class T>
T rounded(double x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16(float(x));
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half(float(x));
  } else {
    return T(x);
  }
}

enum class Layout { tight, padded, odd_stride, odd_address };

inline constexpr unsigned char kGuard = 0xa5;

// A matrix in a buffer of guard bytes.
template <class T>
class Array {
 public:
  Array(long rows, long cols, Layout layout) : rows_(rows), cols_(cols) {
    const long pack = 16 / long(sizeof(T));
    stride_ = layout == Layout::padded ? (cols + 2 * pack - 1) / pack * pack : cols;
    if (layout == Layout::odd_stride) stride_ = cols + 2 * pack + 1;
    bytes_.assign(size_t(rows * stride_) * sizeof(T) + 128, kGuard);
    const auto address = reinterpret_cast<uintptr_t>(bytes_.data());
    begin_ = 32 + (16 - address % 16) % 16 + (layout == Layout::odd_address ? sizeof(T) : 0);
  }
  Array(const Array&) = delete;
  View view() { return {&at(0, 0), rows_, cols_, stride_, 1, kType<T>}; }
  T& at(long i, long j = 0) {
    return reinterpret_cast<T*>(bytes_.data() + begin_)[i * stride_ + j];
  }
  double operator()(long i, long j = 0) { return value(at(i, j)); }

  void check_guards(const std::string& where) {
    std::vector<unsigned char> left = bytes_;
    for (long i = 0; i < rows_; ++i) {
      const long row = long(begin_) + i * stride_ * long(sizeof(T));
      std::fill_n(left.begin() + row, cols_ * sizeof(T), kGuard);
    }
    for (const unsigned char byte : left) CHECK(byte == kGuard, "%s", where.c_str());
  }
  const std::vector<unsigned char>& bytes() const { return bytes_; }

 private:
  long rows_, cols_, stride_;
  size_t begin_;
  std::vector<unsigned char> bytes_;
};

}  // namespace mmfast::testing

#pragma once
#include <cstdint>

namespace mmfast {

enum class Type { f32, f64, bf16, f16, i64, i32, b8 };

// A matrix that somebody else owns; strides count elements. A vector is a matrix of one column.
struct View {
  void* data = nullptr;
  long rows = 0, cols = 0;
  long row_stride = 0, col_stride = 0;
  Type type = Type::f32;

  explicit operator bool() const { return data != nullptr; }
  template <class T>
  T& at(long i, long j = 0) const {
    return static_cast<T*>(data)[i * row_stride + j * col_stride];
  }
  // At most `count` rows, from `begin` on.
  View some_rows(long begin, long count) const {
    const long bytes = type == Type::f64 || type == Type::i64   ? 8
                       : type == Type::f32 || type == Type::i32 ? 4
                       : type == Type::b8                       ? 1
                                                                : 2;
    View part = *this;
    part.data = static_cast<char*>(data) + begin * row_stride * bytes;
    part.rows = rows - begin < count ? rows - begin : count;
    return part;
  }
  View transposed() const { return {data, cols, rows, col_stride, row_stride, type}; }
};

}  // namespace mmfast

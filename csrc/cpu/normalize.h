#pragma once
#include <cstring>

#include "../ops.h"
#include "sparsemax.h"

// A row of scores becomes a row of weights. Scores without a finite maximum make a row of NaN; of
// -inf alone sparsemax makes 0, and sigmoid takes each score for itself.
namespace mmfast::MMFAST_LEVEL {

// take(x[i]) by vectors; `fill` stands behind the last.
template <class T, class Take>
[[gnu::always_inline]] inline void each_vector(const T* x, long n, T fill, Take take) {
  long i = 0;
  for (; i + kWidth<T> <= n; i += kWidth<T>) take(load<T>(x + i));
  if (i == n) return;
  Vec<T> rest = broadcast(fill);
  std::memcpy(&rest, x + i, (n - i) * sizeof(T));
  take(rest);
}

// x[i] = f(x[i]), likewise.
template <class T, class F>
[[gnu::always_inline]] inline void map_vectors(T* x, long n, T fill, F f) {
  T* to = x;
  each_vector(x, n, fill, [&](Vec<T> v) __attribute__((always_inline)) {
    const Vec<T> made = f(v);
    std::memcpy(to, &made, std::min<long>(kWidth<T>, x + n - to) * sizeof(T));
    to += kWidth<T>;
  });
}

// Sums of many vectors: a few at a time in T, then in double.
template <class T>
class LongSum {
 public:
  [[gnu::always_inline]] void add(Vec<T> x) {
    part_ += x;
    if (++count_ % 64 == 0) flush();
  }
  double value() {
    flush();
    return sum_;
  }

 private:
  void flush() {
    sum_ += sum_of_lanes<T>(part_);
    part_ = Vec<T>{};
  }
  Vec<T> part_ = {};
  long count_ = 0;
  double sum_ = 0;
};

template <class T>
double sum_of(const T* x, long n) {
  LongSum<T> sum;
  each_vector(x, n, T{0}, [&](Vec<T> v) { sum.add(v); });
  return sum.value();
}

// The largest; NaN where there is one.
template <class T>
T largest_of(const T* x, long n) {
  Vec<T> most = broadcast(-kInf<T>);
  Ints<T> numbers = Ints<T>{} - 1;
  each_vector(x, n, -kInf<T>, [&](Vec<T> v) __attribute__((always_inline)) {
    most = larger<T>(v, most);
    numbers &= v == v;
  });
  return all<T>(numbers) ? largest_lane<T>(most) : std::numeric_limits<T>::quiet_NaN();
}

template <class T>
void softmax(T* x, long n, T top) {
  LongSum<T> sum;
  map_vectors(x, n, -kInf<T>, [&](Vec<T> v) __attribute__((always_inline)) {
    const Vec<T> e = exp2<5, T>((v - top) * T(kLog2e));
    sum.add(e);
    return e;
  });
  const T total = T(sum.value());
  map_vectors(x, n, T{0}, [&](Vec<T> v) { return v / total; });
}

template <class T>
void sigmoid(T* x, long n) {
  map_vectors(x, n, T{0}, [](Vec<T> v) __attribute__((always_inline)) {
    const Vec<T> one = broadcast<T>(1);
    const Vec<T> e = exp2<5, T>(select<T>(v > 0, -v, v) * T(kLog2e));
    return select<T>(v > 0, one, e) / (one + e);
  });
}

// scratch: threshold_scratch(n) scalars.
template <class T>
void normalize_row(Normalize how, T* x, long n, T* scratch) {
  if (how == Normalize::sigmoid) return sigmoid(x, n);
  if (how == Normalize::sparsemax) {
    const Threshold<T> threshold = find_threshold(x, n, scratch);
    map_vectors(x, n, T{0}, [&](Vec<T> v) { return weights<T>(threshold, v); });
    return;
  }
  const T top = largest_of(x, n);
  if (top > -kInf<T> && top < kInf<T>) return softmax(x, n, top);
  std::fill_n(x, n, std::numeric_limits<T>::quiet_NaN());
}

}  // namespace mmfast::MMFAST_LEVEL

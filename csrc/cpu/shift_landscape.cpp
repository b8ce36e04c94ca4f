// shift_landscape: log-sum-exps of the rows and columns of scale * z[l], own pairs left out, for
// every shift l and every scale, where
//   z[l][i, j] = (s_ij + x.offset[l, i] + y.offset[l, j]) * x.factor[l, i] * y.factor[l, j]
//   s_ij = <x_i, y_j> / (|x_i| |y_j|)
// One product: a block of s waits in the cache while every shift reads it. A scale that is the sum
// of two others takes the product of their powers instead of an exponential.
#include <numeric>

#include "log_sums.h"

namespace mmfast::MMFAST_LEVEL {
namespace {

// for bf16 inputs too: products of powers add up their errors
constexpr int kDegree = 5;

// 2^(scale * z), scale in units of log 2: the product of two powers before it, or by itself.
struct Power {
  double scale;
  long place;  // among the scales as they came
  long first = -1, second = -1;
};

std::vector<Power> powers_of(const std::vector<double>& scales) {
  std::vector<Power> powers;
  for (long t = 0; t < long(scales.size()); ++t) powers.push_back({scales[t] * kLog2e, t});
  std::sort(powers.begin(), powers.end(), [](const Power& a, const Power& b) {
    return a.scale < b.scale || (a.scale == b.scale && a.place < b.place);
  });
  for (long t = 1; t < long(powers.size()); ++t) {
    const double scale = powers[t].scale, rounding = 0x1p-51 * scale;
    for (long a = 0, b = t - 1; a <= b;) {
      const double rest = scale - powers[a].scale - powers[b].scale;
      if (std::abs(rest) <= rounding) {
        powers[t].first = a, powers[t].second = b;
        break;
      }
      rest > 0 ? ++a : --b;
    }
  }
  return powers;
}

// What the visits of one chunk share. Results for shift l and power t begin at at(l, t).
template <class P>
struct Chunk {
  using T = typename P::Scalar;

  const Shifted &x, &y;
  const std::vector<Power>& powers;
  const long N, L, padded;
  const Scores<P> scores;
  const LeftOut<T> left_out;
  Buffer<T> y_inverse, y_factors, y_terms;  // [padded] and twice [L, padded], of a term of z each
  LogSums<T> rows, columns;

  Chunk(const Shifted& x_, const Shifted& y_, const View& numbers, const std::vector<Power>& p,
        const Run& run)
      : x(x_),
        y(y_),
        powers(p),
        N(x.rows.rows),
        L(x.offsets.rows),
        padded(round_up(N, kTileCols<T>)),
        scores(x.rows, y.rows, false, run),
        left_out({x.rows, y.rows, 1, numbers, numbers, {}}),
        y_inverse(padded),
        y_factors(L * padded),
        y_terms(L * padded),
        rows(L * long(p.size()) * padded),
        columns(L * long(p.size()) * padded) {
    for (long j = 0; j < padded; ++j) y_inverse[j] = j < N ? y.inverse.at<T>(j) : 0;
    for (long l = 0; l < L; ++l) {
      for (long j = 0; j < padded; ++j) {
        const T factor = j < N ? y.factors.at<T>(l, j) : 1;
        y_factors[l * padded + j] = factor;
        y_terms[l * padded + j] = j < N ? factor * y.offsets.at<T>(l, j) : 0;
      }
    }
  }
  long at(long l, long t) const { return (l * long(powers.size()) + t) * padded; }
};

// A block of s, `count` rows from i on and `width` columns from j on, and what a visit makes of it.
template <class P>
class Block {
 public:
  using T = typename P::Scalar;
  static constexpr long kRows = kWidth<T>, kCols = kTileCols<T>;

  explicit Block(long powers)
      : s_(kBlock * kBlock),
        z_(kBlock),
        strip_(kBlock * kCols),
        powers_(powers * kBlock),
        row_sums_(powers * kBlock),
        column_sums_(powers * kBlock),
        partial_(powers * kRows) {}

  void make(const Chunk<P>& chunk, long i, long count, long j, long width) {
    i_ = i, count_ = count, j_ = j, width_ = width, cols_ = round_up(width, kCols);
    for (long c = 0; c < cols_; c += kCols) {
      const Matrix<T> strip{s_ + c, kBlock};
      chunk.scores.strip(i, count, j + c, strip);
      for (long r = 0; r < count; ++r) {
        T* const s = strip.at(r, 0).data;
        const Vec<T> inverse = broadcast(chunk.x.inverse.template at<T>(i + r));
        for (long v = 0; v < kCols; v += kRows) {
          store(s + v, load<T>(s + v) * inverse * load<T>(chunk.y_inverse + j + c + v));
        }
      }
      if (chunk.left_out.meets(i, count, j + c)) {
        chunk.left_out.put(-kInf<T>, strip, i, count, j + c);
      }
    }
  }

  // Adds the sums of shift l to those of the chunk: relative to the largest z of the first row, a
  // guess at that of the block; exactly, where that may have lost terms.
  void visit(Chunk<P>& chunk, long l) {
    const long T_ = long(chunk.powers.size());
    std::fill_n(static_cast<T*>(column_sums_), T_ * kBlock, T{0});
    turn(chunk, l, 0);
    Vec<T> best = load<T>(z_);
    for (long c = kRows; c < cols_; c += kRows) best = larger<T>(load<T>(z_ + c), best);
    const T top = largest_lane<T>(best);
    for (long r0 = 0; r0 < count_; r0 += kRows) {
      const long high = std::min(kRows, count_ - r0);
      if (high < kRows) std::fill_n(static_cast<Vec<T>*>(partial_), T_ * kRows, Vec<T>{});
      for (long r = 0; r < high; ++r) {
        turn(chunk, l, r0 + r);
        for (long t = 0; t < T_; ++t) partial_[t * kRows + r] = add(chunk.powers[t], t, top);
      }
      for (long t = 0; t < T_; ++t) {
        store(row_sums_ + t * kBlock + r0, sums_of<T>(partial_ + t * kRows));
      }
    }
    for (long t = 0; t < T_; ++t) {
      if (std::isfinite(top) && sure(row_sums_ + t * kBlock, count_) &&
          sure(column_sums_ + t * kBlock, width_)) {
        merge(chunk, l, t, broadcast<T>(top * T(chunk.powers[t].scale)));
      } else {
        add_all_exactly(chunk, l, t);
      }
    }
  }

 private:
  // One row of z.
  void turn(const Chunk<P>& chunk, long l, long r) {
    const Vec<T> offset = broadcast(chunk.x.offsets.template at<T>(l, i_ + r)),
                 factor = broadcast(chunk.x.factors.template at<T>(l, i_ + r));
    const T *const s = s_ + r * kBlock, *const factors = chunk.y_factors + l * chunk.padded + j_,
                   *const terms = chunk.y_terms + l * chunk.padded + j_;
    T* const z = z_;
    for (long c = 0, cols = cols_; c < cols; c += kRows) {
      store(z + c,
            factor * ((load<T>(s + c) + offset) * load<T>(factors + c) + load<T>(terms + c)));
    }
  }

  // Adds power t of the row of z to the columns, and returns its sum lane by lane.
  Vec<T> add(const Power& power, long t, T top) {
    if (power.first >= 0) {
      const T *const a = powers_ + power.first * kBlock, *const b = powers_ + power.second * kBlock;
      return add(t, [=](long c) { return load<T>(a + c) * load<T>(b + c); });
    }
    const T* const z = z_;
    const Vec<T> scale = broadcast(T(power.scale)), shift = broadcast<T>(-top * T(power.scale));
    return add(t, [=](long c) { return exp2<kDegree, T>(load<T>(z + c) * scale + shift); });
  }

  template <class Of>
  [[gnu::always_inline]] Vec<T> add(long t, Of power) {
    T *const to = powers_ + t * kBlock, *const sums = column_sums_ + t * kBlock;
    // a sum of its own for each of these: one would have every addition wait for the last
    Vec<T> row[kTileVectors] = {};
    for (long c0 = 0, cols = cols_; c0 < cols; c0 += kCols) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const long c = c0 + v * kRows;
        const Vec<T> p = power(c);
        store(to + c, p);
        store(sums + c, load<T>(sums + c) + p);
        row[v] += p;
      }
    }
#pragma GCC unroll 4
    for (int v = 1; v < kTileVectors; ++v) row[0] += row[v];
    return row[0];
  }

  // Whether nothing that counts was lost.
  static bool sure(const T* sums, long count) {
    bool good = true;
    for (long c = 0; c < count; ++c) good &= (sums[c] >= kFaint<T>)&(sums[c] <= kLoud<T>);
    return good;
  }

  void merge(Chunk<P>& chunk, long l, long t, Vec<T> top) {
    const long at = chunk.at(l, t);
    for (long r = 0; r < count_; r += kRows) {
      chunk.rows.template add<kDegree>(at + i_ + r, top, load<T>(row_sums_ + t * kBlock + r));
    }
    for (long c = 0; c < cols_; c += kRows) {
      chunk.columns.template add<kDegree>(at + j_ + c, top, load<T>(column_sums_ + t * kBlock + c));
    }
  }

  void add_all_exactly(Chunk<P>& chunk, long l, long t) {
    const long at = chunk.at(l, t);
    const Vec<T> scale = broadcast<T>(T(chunk.powers[t].scale));
    for (long c0 = 0; c0 < cols_; c0 += kCols) {
      for (long r = 0; r < count_; ++r) {
        turn(chunk, l, r);
        for (long c = 0; c < kCols; c += kRows) {
          store(strip_ + r * kCols + c, load<T>(z_ + c0 + c) * scale);
        }
      }
      std::fill(strip_ + count_ * kCols, strip_ + round_up(count_, kRows) * kCols, -kInf<T>);
      add_exactly<kDegree, T>(strip_, count_, std::min(kCols, width_ - c0), chunk.rows, at + i_,
                              &chunk.columns, at + j_ + c0);
    }
  }

  Buffer<T> s_, z_, strip_;                    // [kBlock, kBlock], [kBlock], [kBlock, kCols]
  Buffer<T> powers_, row_sums_, column_sums_;  // [powers, kBlock]
  Buffer<Vec<T>> partial_;                     // [powers, kRows]: sums of rows, lane by lane
  long i_ = 0, count_ = 0, j_ = 0, width_ = 0, cols_ = 0;
};

template <class P>
void landscape(const Shifted& x, const Shifted& y, const View& numbers,
               const std::vector<Power>& powers, const View& rows, const View& columns,
               const Run& run) {
  using T = typename P::Scalar;
  const long T_ = long(powers.size());
  Chunk<P> chunk(x, y, numbers, powers, run);
  const Cut cut(chunk.N);
  std::vector<Block<P>> blocks;
  for (int thread = 0; thread < run.threads; ++thread) blocks.emplace_back(T_);
  sweep({cut.count, cut.count}, run, [&](long lane, long group, int thread) {
    const TileRegisters<P> held;
    Block<P>& block = blocks[thread];
    for (long i = cut.begin(lane); i < cut.end(lane); i += kBlock) {
      for (long j = cut.begin(group); j < cut.end(group); j += kBlock) {
        block.make(chunk, i, std::min(kBlock, cut.end(lane) - i), j,
                   std::min(kBlock, cut.end(group) - j));
        for (long l = 0; l < chunk.L; ++l) block.visit(chunk, l);
      }
    }
  });
  for_each(chunk.L * T_, run, [&](long lt, int) {
    const long l = lt / T_, t = lt % T_, to = l * T_ + powers[t].place;
    for (long i = 0; i < chunk.N; ++i) {
      rows.at<T>(to, i) = T(chunk.rows.total(chunk.at(l, t) + i).log());
      columns.at<T>(to, i) = T(chunk.columns.total(chunk.at(l, t) + i).log());
    }
  });
}

// `count` rows from `begin` on
View slice(View v, long begin, long count) {
  const long size = v.type == Type::f64 ? 8 : v.type == Type::f32 ? 4 : 2;
  v.data = static_cast<char*>(v.data) + begin * v.row_stride * size;
  v.rows = count;
  return v;
}
View slice_columns(const View& v, long begin, long count) {
  return slice(v.transposed(), begin, count).transposed();
}
Shifted slice(const Shifted& side, long begin, long count) {
  return {slice(side.rows, begin, count), slice(side.inverse, begin, count),
          slice_columns(side.offsets, begin, count), slice_columns(side.factors, begin, count)};
}

}  // namespace

void shift_landscape(const Shifted& x, const Shifted& y, const std::vector<double>& scales,
                     long chunk, View rows, View columns, const Run& run) {
  const long N = x.rows.rows, size = std::min(chunk, N), chunks = (N + size - 1) / size;
  const std::vector<Power> powers = powers_of(scales);
  std::vector<int64_t> numbers(size);
  std::iota(numbers.begin(), numbers.end(), 0);
  const auto one = [&](long c, const Run& how) {
    const long begin = c * size, count = std::min(size, N - begin);
    const View own{numbers.data(), count, 1, 1, 1, Type::i64};
    with_arithmetic(x.rows.type, [&](auto arithmetic) {
      landscape<decltype(arithmetic)>(slice(x, begin, count), slice(y, begin, count), own, powers,
                                      slice_columns(rows, begin, count),
                                      slice_columns(columns, begin, count), how);
    });
  };
  // a chunk has the same bits on any number of threads: many of them take one each
  if (chunks >= 2 * run.threads) {
    for_each(chunks, run, [&](long c, int) { one(c, Run{1, {}}); });
  } else {
    for (long c = 0; c < chunks; ++c) one(c, run);
  }
}

}  // namespace mmfast::MMFAST_LEVEL

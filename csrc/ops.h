#pragma once
#include <functional>
#include <vector>

#include "view.h"

// What each op does. Every instruction set has these functions in a namespace of its own
// (cpu/isa.h); the ones declared here call those of the level in use (cpu/dispatch.cpp).
namespace mmfast {

// How to run: on how many threads, and whether the caller wants to give up (asked a few times a
// second, on the calling thread).
struct Run {
  int threads = 1;
  std::function<bool()> stop;
};

// Thrown when `Run::stop` said yes; outputs are then unfinished.
struct Stopped {};

// S[i, j] = scale * <q_i, k_j> over the pairs that stay: q_ids[i] != k_ids[j] and mask[i, j].
struct Pairs {
  View q, k;  // [N, D], [M, D]: f32, f64, bf16 or f16, inner stride 1
  double scale = 1;
  View q_ids, k_ids;  // int64 [N], [M], or empty
  View mask;          // bool [N, M], or empty
};

// rows[i] = log sum_j exp S[i, j], columns[j] = log sum_i exp S[i, j]; an empty view is not asked
// for. f32 results (f64 for f64 inputs).
void pairwise_lse_forward(const Pairs&, View rows, View columns, const Run&);

// Gradients of sum(g_rows * rows) + sum(g_columns * columns) into dq [N, D] and dk [M, D] (type of
// q, contiguous); returns that of the scale, or 0 where `need_scale` is false.
double pairwise_lse_backward(const Pairs&, View g_rows, View g_columns, View rows, View columns,
                             View dq, View dk, bool need_scale, const Run&);

// rows[i] as above, and mean[i] = sum_j exp(S[i, j] - rows[i]) k_j, 0 for an empty row: rows [N]
// and mean [N, D], f32 (f64 for f64 inputs), contiguous.
void pairwise_lse_mean(const Pairs&, View rows, View mean, const Run&);

// The sum of softplus(S + bias) over the pairs, and its gradients with respect to scale and bias, 0
// where they are not needed.
struct SoftplusSum {
  double value = 0, d_scale = 0, d_bias = 0;
};

// The same of q and k into dq [N, D] and dk [M, D] (f32, f64 for f64 inputs; contiguous); an empty
// view is not asked for.
SoftplusSum pairwise_softplus(const Pairs&, double bias, View dq, View dk, bool need_scale,
                              bool need_bias, const Run&);

// indices[i] (int64) = the column drawn for row i with probability proportional to exp S[i, j], or
// -1 where no score is left that is above -inf. The same for the same seed, whatever runs it.
void sample_negatives(const Pairs&, uint64_t seed, View indices, const Run&);

// Tokens [B, N, D] against codes [C, D]: s = scale * <token, code>.
enum class Normalize { sparsemax, softmax, sigmoid };
struct TokenPool {
  View tokens;    // [B, N * D]: f32, f64, bf16 or f16, inner stride 1
  View codebook;  // [C, D] of the same type, inner stride 1
  double scale = 1;
  Normalize normalize = Normalize::sparsemax;
  View mask;  // bool [B, N], the places that hold a token, or empty
  double padded_score = 0;
};

// winners[b, c] (i32) = the first token of the largest s, or -1 where a padded place has more;
// weights [B, C] (f32, f64 for f64 inputs) = that score, normalised over the codes; pooled [B, D]
// (type of tokens) = the codes so weighted, for sigmoid divided by the sum of the weights.
// All contiguous.
void fdt_pool_forward(const TokenPool&, View pooled, View weights, View winners, const Run&);

// Gradients for upstream g_pooled [B, D] and g_weights [B, C], either may be empty, into d_tokens
// [B, N * D] and d_codebook [C, D], contiguous; an empty view is not asked for. Returns that of the
// scale, or 0 where `need_scale` is false. The mask is not looked at.
double fdt_pool_backward(const TokenPool&, View g_pooled, View g_weights, View weights,
                         View winners, View d_tokens, View d_codebook, bool need_scale, const Run&);

// A product <x_row, y_column>; row -1: there is none.
struct Extreme {
  double value;
  long row, column;
};

// Sums of (<x_i, y_j> - pivot)^p for p = 1 to 4, and the extremes with the lowest row, then column.
struct PairStats {
  double powers[4];
  Extreme least, largest;
};

// All pairs of x and y, or with an empty y those i < j of x, but for products that are NaN. counts
// (int64): how many lie below `edges` (f64, [bins + 1], increasing), in each bin (the last one
// closed) and above; without edges [1], of all.
PairStats pairwise_stats(View x, View y, View edges, double pivot, View counts, const Run&);

// largest[i] (f32, f64 for f64 inputs) = max_j <q_i, k_j> over the pairs, index[i] (int64) the
// lowest j that has it; -inf and -1 where no product is above -inf. above[i] (int64) = how many
// exceed threshold[i] (type of largest); 0 without one. No scale, no mask.
void pairwise_rank(const Pairs&, View threshold, View largest, View index, View above, const Run&);

// One side of the shifted cosines of all pairs: its rows [N, D]; one over their lengths [N]; for
// each of L shifts what a row adds to a cosine and then multiplies it by [L, N]. The last three are
// f32 (f64 for f64 rows).
struct Shifted {
  View rows, inverse, offsets, factors;
};

// With z[l, i, j] = (<x_i, y_j> / (|x_i| |y_j|) + x.offsets[l, i] + y.offsets[l, j]) *
// x.factors[l, i] * y.factors[l, j] over the pairs of the same `chunk` rows: rows[l * T + t, i] =
// log sum_{j != i} exp(scales[t] * z[l, i, j]), and columns [L * T, N] the same over i != j; scales
// > 0.
void shift_landscape(const Shifted& x, const Shifted& y, const std::vector<double>& scales,
                     long chunk, View rows, View columns, const Run&);

// out = k1 a + k2 b by rows, the weights by slerp.h from <a_i, b_i> and lam_i: a, b and out [N, D]
// of one floating type, inner stride 1; lam [N] in the type of the arithmetic (f64 for f64 inputs,
// f32 for the others), where a stride of 0 is one value for all rows.
void slerp_forward(View a, View b, View lam, View out, const Run&);

// Gradients for the upstream g [N, D] into da, db [N, D] and, by rows, dlam [N] (type of lam); an
// empty view is not asked for.
void slerp_backward(View g, View a, View b, View lam, View da, View db, View dlam, const Run&);

// out = max(x - tau, 0) by rows, tau of each such that it sums to 1: x and out [N, M] of one
// floating type, inner stride 1; no row is empty. A row with NaN or +inf is NaN throughout, one of
// -inf alone is 0.
void sparsemax_forward(View x, View out, const Run&);

// dx = the upstream g less its mean over the support of the weights p, 0 outside of it (NaN where p
// is): all [N, M], like out.
void sparsemax_backward(View g, View p, View dx, const Run&);

// GFLOP/s of the register tile on operands that stay in cache.
double tile_rate(Type, double seconds, int threads);

// The same of float32 multiply-adds whose operands stay in registers: what the processor can do.
double multiply_add_rate(double seconds, int threads);

}  // namespace mmfast

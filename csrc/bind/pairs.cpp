// Ops over pairs.
#include <tuple>

#include "border.h"

namespace mmfast::border {
namespace {

void forward(py::handle q, py::handle k, double scale, py::handle q_ids, py::handle k_ids,
             py::handle mask, py::handle rows, py::handle columns, int threads) {
  const PairArrays in(q, k, scale, q_ids, k_ids, mask);
  const Array r(rows, "rows", 1), c(columns, "columns", 1);
  check_vector(r.view(), "rows", in.pairs.q.rows, wide(in.pairs.q.type));
  check_vector(c.view(), "columns", in.pairs.k.rows, wide(in.pairs.q.type));
  released(threads, [&](const Run& run) {
    mmfast::pairwise_lse_forward(in.pairs, r.view(), c.view(), run);
  });
}

double backward(py::handle g_rows, py::handle g_columns, py::handle q, py::handle k, double scale,
                py::handle q_ids, py::handle k_ids, py::handle mask, py::handle rows,
                py::handle columns, py::handle dq, py::handle dk, bool need_scale, int threads) {
  const PairArrays in(q, k, scale, q_ids, k_ids, mask);
  const Array gr(g_rows, "g_rows", 1), gc(g_columns, "g_columns", 1), r(rows, "rows", 1),
      c(columns, "columns", 1), q_out(dq, "dq", 2), k_out(dk, "dk", 2);
  const Type type = wide(in.pairs.q.type);
  const long N = in.pairs.q.rows, M = in.pairs.k.rows;
  check_vector(gr.view(), "g_rows", N, type);
  check_vector(r.view(), "rows", N, type);
  check_vector(gc.view(), "g_columns", M, type);
  check_vector(c.view(), "columns", M, type);
  check(!gr.view() || r.view(), "g_rows needs rows");
  check(!gc.view() || c.view(), "g_columns needs columns");
  const View dq_view = canonical(q_out.view()), dk_view = canonical(k_out.view());
  check_matrix(dq_view, "dq", in.pairs.q, true);
  check_matrix(dk_view, "dk", in.pairs.k, true);
  return released(threads, [&](const Run& run) {
    return mmfast::pairwise_lse_backward(in.pairs, gr.view(), gc.view(), r.view(), c.view(),
                                         dq_view, dk_view, need_scale, run);
  });
}

void lse_mean(py::handle q, py::handle k, double scale, py::handle q_ids, py::handle k_ids,
              py::handle mask, py::handle rows, py::handle mean, int threads) {
  const PairArrays in(q, k, scale, q_ids, k_ids, mask);
  const Array r(rows, "rows", 1), m(mean, "mean", 2);
  check(r.view() && m.view(), "rows and mean must be given");
  const View mean_view = canonical(m.view());
  View like = in.pairs.q;
  like.type = wide(like.type);
  check_vector(r.view(), "rows", like.rows, like.type);
  check_matrix(mean_view, "mean", like, true);
  released(threads,
           [&](const Run& run) { mmfast::pairwise_lse_mean(in.pairs, r.view(), mean_view, run); });
}

auto softplus(py::handle q, py::handle k, double scale, double bias, py::handle q_ids,
              py::handle k_ids, py::handle dq, py::handle dk, bool need_scale, bool need_bias,
              int threads) {
  const PairArrays in(q, k, scale, q_ids, k_ids, py::none());
  const Array q_out(dq, "dq", 2), k_out(dk, "dk", 2);
  const View dq_view = canonical(q_out.view()), dk_view = canonical(k_out.view());
  View q_like = in.pairs.q, k_like = in.pairs.k;
  q_like.type = k_like.type = wide(q_like.type);
  check_matrix(dq_view, "dq", q_like, true);
  check_matrix(dk_view, "dk", k_like, true);
  const auto sum = released(threads, [&](const Run& run) {
    return mmfast::pairwise_softplus(in.pairs, bias, dq_view, dk_view, need_scale, need_bias, run);
  });
  return std::make_tuple(sum.value, sum.d_scale, sum.d_bias);
}

void sample_negatives(py::handle q, py::handle k, double scale, int64_t seed, py::handle q_ids,
                      py::handle k_ids, py::handle indices, int threads) {
  const PairArrays in(q, k, scale, q_ids, k_ids, py::none());
  const Array out(indices, "indices", 1);
  check(bool(out.view()), "indices must be given");
  check_vector(out.view(), "indices", in.pairs.q.rows, Type::i64);
  released(threads, [&](const Run& run) {
    mmfast::sample_negatives(in.pairs, uint64_t(seed), out.view(), run);
  });
}

auto pairwise_stats(py::handle x, py::handle y, py::handle edges, double pivot, py::handle counts,
                    int threads) {
  // one set is a pair of the same
  const PairArrays in(x, y.is_none() ? x : y, 1, py::none(), py::none(), py::none());
  const Array bounds(edges, "edges", 1), out(counts, "counts", 1);
  check(bool(out.view()), "counts must be given");
  check(!bounds.view() || bounds.view().rows >= 2, "edges must have 2 elements at least");
  check_vector(bounds.view(), "edges", bounds.view().rows, Type::f64);
  check_vector(out.view(), "counts", bounds.view() ? bounds.view().rows + 1 : 1, Type::i64);
  const auto stats = released(threads, [&](const Run& run) {
    return mmfast::pairwise_stats(in.pairs.q, y.is_none() ? View{} : in.pairs.k, bounds.view(),
                                  pivot, out.view(), run);
  });
  const auto place = [](const mmfast::Extreme& e) {
    return std::make_tuple(e.value, e.row, e.column);
  };
  const auto& p = stats.powers;
  return std::make_tuple(std::make_tuple(p[0], p[1], p[2], p[3]), place(stats.least),
                         place(stats.largest));
}

void pairwise_rank(py::handle q, py::handle k, py::handle threshold, py::handle q_ids,
                   py::handle k_ids, py::handle largest, py::handle index, py::handle above,
                   int threads) {
  const PairArrays in(q, k, 1, q_ids, k_ids, py::none());
  const Array limit(threshold, "threshold", 1), best(largest, "largest", 1), at(index, "index", 1),
      more(above, "above", 1);
  const long N = in.pairs.q.rows;
  check(best.view() && at.view() && more.view(), "largest, index and above must be given");
  check_vector(limit.view(), "threshold", N, wide(in.pairs.q.type));
  check_vector(best.view(), "largest", N, wide(in.pairs.q.type));
  check_vector(at.view(), "index", N, Type::i64);
  check_vector(more.view(), "above", N, Type::i64);
  released(threads, [&](const Run& run) {
    mmfast::pairwise_rank(in.pairs, limit.view(), best.view(), at.view(), more.view(), run);
  });
}

// One side of shift_landscape.
struct ShiftedArrays {
  Array rows, inverse, offsets, factors;
  mmfast::Shifted side;

  ShiftedArrays(const std::string& name, py::handle rows_, py::handle inverse_, py::handle offsets_,
                py::handle factors_)
      : rows(rows_, name.c_str(), 2),
        inverse(inverse_, (name + "_inverse").c_str(), 1),
        offsets(offsets_, (name + "_offsets").c_str(), 2),
        factors(factors_, (name + "_factors").c_str(), 2) {
    side = {canonical(rows.view()), inverse.view(), offsets.view(), factors.view()};
    const View& x = side.rows;
    check(x.rows > 0 && x.cols > 0, name + " must be given, and not empty");
    check(x.col_stride == 1, name + " must have inner stride 1");
    if (!floating(x.type)) {
      throw py::type_error(name + " must be of a floating type");
    }
    check(side.inverse && side.offsets && side.factors,
          name + "_inverse, " + name + "_offsets and " + name + "_factors must be given");
    check_vector(side.inverse, (name + "_inverse").c_str(), x.rows, wide(x.type));
    View like = side.offsets;
    like.cols = x.rows, like.type = wide(x.type);
    check_matrix(side.offsets, (name + "_offsets").c_str(), like, false);
    check_matrix(side.factors, (name + "_factors").c_str(), like, false);
  }
};

void shift_landscape(py::handle x, py::handle x_inverse, py::handle x_offsets, py::handle x_factors,
                     py::handle y, py::handle y_inverse, py::handle y_offsets, py::handle y_factors,
                     const std::vector<double>& scales, long chunk, py::handle rows,
                     py::handle columns, int threads) {
  const ShiftedArrays a("x", x, x_inverse, x_offsets, x_factors),
      b("y", y, y_inverse, y_offsets, y_factors);
  check_matrix(b.side.rows, "y", a.side.rows, false);
  check_matrix(b.side.offsets, "y_offsets", a.side.offsets, false);
  check(!scales.empty() && chunk >= 1, "scales must not be empty, and chunk at least 1");
  const Array r(rows, "rows", 2), c(columns, "columns", 2);
  check(r.view() && c.view(), "rows and columns must be given");
  View like = a.side.offsets;
  like.rows *= long(scales.size());
  check_matrix(r.view(), "rows", like, false);
  check_matrix(c.view(), "columns", like, false);
  released(threads, [&](const Run& run) {
    mmfast::shift_landscape(a.side, b.side, scales, chunk, r.view(), c.view(), run);
  });
}

}  // namespace

void define_pairs(py::module_& m) {
  m.def("pairwise_lse_forward", &forward, py::arg("q"), py::arg("k"), py::arg("scale"),
        py::arg("q_ids"), py::arg("k_ids"), py::arg("mask"), py::arg("rows"), py::arg("columns"),
        py::arg("threads"));
  m.def("pairwise_lse_backward", &backward, py::arg("g_rows"), py::arg("g_columns"), py::arg("q"),
        py::arg("k"), py::arg("scale"), py::arg("q_ids"), py::arg("k_ids"), py::arg("mask"),
        py::arg("rows"), py::arg("columns"), py::arg("dq"), py::arg("dk"), py::arg("need_scale"),
        py::arg("threads"));
  m.def("pairwise_lse_mean", &lse_mean, py::arg("q"), py::arg("k"), py::arg("scale"),
        py::arg("q_ids"), py::arg("k_ids"), py::arg("mask"), py::arg("rows"), py::arg("mean"),
        py::arg("threads"));
  m.def("pairwise_softplus", &softplus, py::arg("q"), py::arg("k"), py::arg("scale"),
        py::arg("bias"), py::arg("q_ids"), py::arg("k_ids"), py::arg("dq"), py::arg("dk"),
        py::arg("need_scale"), py::arg("need_bias"), py::arg("threads"));
  m.def("sample_negatives", &sample_negatives, py::arg("q"), py::arg("k"), py::arg("scale"),
        py::arg("seed"), py::arg("q_ids"), py::arg("k_ids"), py::arg("indices"),
        py::arg("threads"));
  m.def("pairwise_stats", &pairwise_stats, py::arg("x"), py::arg("y"), py::arg("edges"),
        py::arg("pivot"), py::arg("counts"), py::arg("threads"));
  m.def("pairwise_rank", &pairwise_rank, py::arg("q"), py::arg("k"), py::arg("threshold"),
        py::arg("q_ids"), py::arg("k_ids"), py::arg("largest"), py::arg("index"), py::arg("above"),
        py::arg("threads"));
  m.def("shift_landscape", &shift_landscape, py::arg("x"), py::arg("x_inverse"),
        py::arg("x_offsets"), py::arg("x_factors"), py::arg("y"), py::arg("y_inverse"),
        py::arg("y_offsets"), py::arg("y_factors"), py::arg("scales"), py::arg("chunk"),
        py::arg("rows"), py::arg("columns"), py::arg("threads"));
}

}  // namespace mmfast::border

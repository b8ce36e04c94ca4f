// The only file that sees pybind11: arrays in, what memory safety needs checked, GIL released,
// call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <map>
#include <string_view>
#include <tuple>

#include "cuda/ops.h"
#include "dlpack.h"
#include "levels.h"
#include "ops.h"

namespace py = pybind11;
using mmfast::Pairs;
using mmfast::Run;
using mmfast::Type;
using mmfast::View;
using mmfast::dlpack::Array;
using mmfast::dlpack::kCpu;
using mmfast::dlpack::kCuda;

namespace {

void check(bool good, const std::string& message) {
  if (!good) throw py::value_error(message);
}

// Element type of results: what the kernels accumulate in.
Type wide(Type type) { return type == Type::f64 ? Type::f64 : Type::f32; }

void check_vector(const View& x, const char* name, long length, Type type) {
  if (!x) return;
  check(x.rows == length, std::string(name) + " must have " + std::to_string(length) +
                              " elements, got " + std::to_string(x.rows));
  if (x.type != type) throw py::type_error(std::string(name) + " has the wrong element type");
}

void check_matrix(const View& x, const char* name, const View& like, bool contiguous) {
  if (!x) return;
  check(x.rows == like.rows && x.cols == like.cols,
        std::string(name) + " must be [" + std::to_string(like.rows) + ", " +
            std::to_string(like.cols) + "], got [" + std::to_string(x.rows) + ", " +
            std::to_string(x.cols) + "]");
  if (x.type != like.type) throw py::type_error(std::string(name) + " has the wrong element type");
  check(!contiguous || (x.col_stride == 1 && (x.row_stride == x.cols || x.rows == 1)),
        std::string(name) + " must be contiguous");
}

// A stride means nothing where there is one element; torch leaves any number there.
View canonical(View x) {
  if (x.cols == 1) x.col_stride = 1;
  return x;
}

// The arrays every op over pairs is given.
struct PairArrays {
  Array q, k, q_ids, k_ids, mask;
  Pairs pairs;

  PairArrays(py::handle q_, py::handle k_, double scale, py::handle q_ids_, py::handle k_ids_,
             py::handle mask_)
      : q(q_, "q", 2),
        k(k_, "k", 2),
        q_ids(q_ids_, "q_ids", 1),
        k_ids(k_ids_, "k_ids", 1),
        mask(mask_, "mask", 2) {
    pairs = {canonical(q.view()), canonical(k.view()), scale,
             q_ids.view(),        k_ids.view(),        mask.view()};
    const auto& [a, b, s, a_ids, b_ids, m] = pairs;
    check(a.rows > 0 && b.rows > 0 && a.cols > 0, "q and k must be given, and not empty");
    check(a.cols == b.cols, "k must have " + std::to_string(a.cols) + " columns like q, got " +
                                std::to_string(b.cols));
    check(a.col_stride == 1 && b.col_stride == 1, "q and k must have inner stride 1");
    if (a.type != b.type || a.type == Type::i64 || a.type == Type::i32 || a.type == Type::b8) {
      throw py::type_error("q and k must share one floating type");
    }
    check(bool(a_ids) == bool(b_ids), "q_ids and k_ids must be given together");
    check_vector(a_ids, "q_ids", a.rows, Type::i64);
    check_vector(b_ids, "k_ids", b.rows, Type::i64);
    if (!m) return;
    check(m.rows == a.rows && m.cols == b.rows, "mask must be [N, M]");
    if (m.type != Type::b8) throw py::type_error("mask must be bool");
  }
};

// Runs without the GIL, and lets Ctrl-C through: Python hears signals on its main thread alone, so
// the calling thread takes the GIL back for a moment and asks.
template <class Body>
auto released(int threads, Body body) {
  check(threads >= 1, "threads must be at least 1");
  const Run run{threads, [] {
                  py::gil_scoped_acquire held;
                  return PyErr_CheckSignals() != 0;
                }};
  try {
    py::gil_scoped_release release;
    return body(run);
  } catch (const mmfast::Stopped&) {
    throw py::error_already_set();
  }
}

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

// The arrays both directions of fdt_pool are given.
struct PoolArrays {
  Array tokens, codebook, weights, winners, mask;
  mmfast::TokenPool pool;
  View pooled_like;  // [B, D] in the type of tokens

  PoolArrays(py::handle tokens_, py::handle codebook_, double scale, const std::string& normalize,
             py::handle weights_, py::handle winners_, py::handle mask_)
      : tokens(tokens_, "tokens", 2),
        codebook(codebook_, "codebook", 2),
        weights(weights_, "weights", 2),
        winners(winners_, "winners", 2),
        mask(mask_, "mask", 2) {
    const View x = canonical(tokens.view()), codes = canonical(codebook.view()), m = mask.view();
    check(x.rows > 0 && x.cols > 0 && codes.rows > 0 && codes.cols > 0,
          "tokens and codebook must be given, and not empty");
    check(x.cols % codes.cols == 0, "tokens must be [B, N * D] with D of the codebook");
    check(x.col_stride == 1 && codes.col_stride == 1,
          "tokens and codebook must have inner stride 1");
    if (x.type != codes.type || x.type == Type::i64 || x.type == Type::i32 || x.type == Type::b8) {
      throw py::type_error("tokens and codebook must share one floating type");
    }
    static const std::map<std::string, mmfast::Normalize> kNames{
        {"sparsemax", mmfast::Normalize::sparsemax},
        {"softmax", mmfast::Normalize::softmax},
        {"sigmoid", mmfast::Normalize::sigmoid}};
    check(kNames.count(normalize) == 1, "normalize has no " + normalize);
    const long B = x.rows, C = codes.rows;
    check_matrix(canonical(weights.view()), "weights", {nullptr, B, C, C, 1, wide(x.type)}, true);
    check_matrix(canonical(winners.view()), "winners", {nullptr, B, C, C, 1, Type::i32}, true);
    check(weights.view() && winners.view(), "weights and winners must be given");
    check_matrix(m, "mask", {nullptr, B, x.cols / codes.cols, 0, 0, Type::b8}, false);
    pool = {x, codes, scale, kNames.at(normalize), m, 0};
    pooled_like = {nullptr, B, codes.cols, codes.cols, 1, x.type};
  }
};

void fdt_pool_forward(py::handle tokens, py::handle codebook, double scale, py::handle mask,
                      const std::string& normalize, double padded_score, py::handle pooled,
                      py::handle weights, py::handle winners, int threads) {
  PoolArrays in(tokens, codebook, scale, normalize, weights, winners, mask);
  in.pool.padded_score = padded_score;
  const Array out(pooled, "pooled", 2);
  const View out_view = canonical(out.view());
  check(bool(out_view), "pooled must be given");
  check_matrix(out_view, "pooled", in.pooled_like, true);
  released(threads, [&](const Run& run) {
    mmfast::fdt_pool_forward(in.pool, out_view, in.weights.view(), in.winners.view(), run);
  });
}

double fdt_pool_backward(py::handle g_pooled, py::handle g_weights, py::handle tokens,
                         py::handle codebook, double scale, const std::string& normalize,
                         py::handle weights, py::handle winners, py::handle d_tokens,
                         py::handle d_codebook, bool need_scale, int threads) {
  const PoolArrays in(tokens, codebook, scale, normalize, weights, winners, py::none());
  const Array gp(g_pooled, "g_pooled", 2), gw(g_weights, "g_weights", 2),
      dt(d_tokens, "d_tokens", 2), dc(d_codebook, "d_codebook", 2);
  const View gp_view = canonical(gp.view()), gw_view = canonical(gw.view());
  const View dt_view = canonical(dt.view()), dc_view = canonical(dc.view());
  check_matrix(gp_view, "g_pooled", in.pooled_like, true);
  check_matrix(gw_view, "g_weights", in.weights.view(), true);
  check_matrix(dt_view, "d_tokens", in.pool.tokens, true);
  check_matrix(dc_view, "d_codebook", in.pool.codebook, true);
  return released(threads, [&](const Run& run) {
    return mmfast::fdt_pool_backward(in.pool, gp_view, gw_view, in.weights.view(),
                                     in.winners.view(), dt_view, dc_view, need_scale, run);
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
    if (x.type == Type::i64 || x.type == Type::b8) {
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

void check_one_device(std::initializer_list<const Array*> arrays) {
  int device = -1;
  for (const Array* x : arrays) {
    if (!x->view()) continue;
    check(device < 0 || device == x->device_id(), "all arrays must be on one device");
    device = x->device_id();
  }
}

// The arrays both directions of slerp are given.
struct MixArrays {
  Array a, b, lam;
  View a_view, b_view, lam_view;

  MixArrays(py::handle a_, py::handle b_, py::handle lam_, int32_t device = kCpu)
      : a(a_, "a", 2, device), b(b_, "b", 2, device), lam(lam_, "lam", 1, device) {
    a_view = canonical(a.view()), b_view = canonical(b.view()), lam_view = lam.view();
    check(a_view.rows > 0 && a_view.cols > 0, "a must be given, and not empty");
    check(b_view && lam_view, "b and lam must be given");
    if (a_view.type == Type::i64 || a_view.type == Type::i32 || a_view.type == Type::b8) {
      throw py::type_error("a must be of a floating type");
    }
    check_rows(a_view, "a", false);
    check_rows(b_view, "b", false);
    if (lam_view.rows == 1) lam_view.rows = a_view.rows, lam_view.row_stride = 0;
    check_vector(lam_view, "lam", a_view.rows, wide(a_view.type));
  }
  void check_rows(const View& x, const char* name, bool contiguous) const {
    check_matrix(x, name, a_view, contiguous);
    check(!x || x.col_stride == 1, std::string(name) + " must have inner stride 1");
  }
};

struct MixForward : MixArrays {
  Array out;
  View out_view;

  MixForward(py::handle a_, py::handle b_, py::handle lam_, py::handle out_, int32_t device)
      : MixArrays(a_, b_, lam_, device), out(out_, "out", 2, device) {
    out_view = canonical(out.view());
    check(bool(out_view), "out must be given");
    check_rows(out_view, "out", true);
    check_one_device({&a, &b, &lam, &out});
  }
};

struct MixBackward : MixArrays {
  Array g, da, db, dlam;
  View g_view, da_view, db_view, dlam_view;

  MixBackward(py::handle g_, py::handle a_, py::handle b_, py::handle lam_, py::handle da_,
              py::handle db_, py::handle dlam_, int32_t device)
      : MixArrays(a_, b_, lam_, device),
        g(g_, "g", 2, device),
        da(da_, "da", 2, device),
        db(db_, "db", 2, device),
        dlam(dlam_, "dlam", 1, device) {
    g_view = canonical(g.view()), da_view = canonical(da.view()), db_view = canonical(db.view());
    dlam_view = dlam.view();
    check(bool(g_view), "g must be given");
    check_rows(g_view, "g", false);
    check_rows(da_view, "da", true);
    check_rows(db_view, "db", true);
    check_vector(dlam_view, "dlam", a_view.rows, wide(a_view.type));
    check_one_device({&g, &a, &b, &lam, &da, &db, &dlam});
  }
};

void slerp_forward(py::handle a, py::handle b, py::handle lam, py::handle out, int threads) {
  const MixForward in(a, b, lam, out, kCpu);
  released(threads, [&](const Run& run) {
    mmfast::slerp_forward(in.a_view, in.b_view, in.lam_view, in.out_view, run);
  });
}

void slerp_backward(py::handle g, py::handle a, py::handle b, py::handle lam, py::handle da,
                    py::handle db, py::handle dlam, int threads) {
  const MixBackward in(g, a, b, lam, da, db, dlam, kCpu);
  released(threads, [&](const Run& run) {
    mmfast::slerp_backward(in.g_view, in.a_view, in.b_view, in.lam_view, in.da_view, in.db_view,
                           in.dlam_view, run);
  });
}

// Rows of one floating type that sparsemax reads and writes; `out` is contiguous.
struct RowArrays {
  Array a, out;
  View a_view, out_view;

  RowArrays(py::handle a_, const char* name, py::handle out_, const char* out_name, int32_t device)
      : a(a_, name, 2, device), out(out_, out_name, 2, device) {
    a_view = canonical(a.view()), out_view = canonical(out.view());
    check(a_view.rows > 0 && a_view.cols > 0, std::string(name) + " must be given, and not empty");
    check(bool(out_view), std::string(out_name) + " must be given");
    if (a_view.type == Type::i64 || a_view.type == Type::b8) {
      throw py::type_error(std::string(name) + " must be of a floating type");
    }
    check(a_view.col_stride == 1, std::string(name) + " must have inner stride 1");
    check_matrix(out_view, out_name, a_view, true);
    check_one_device({&a, &out});
  }
};

struct ProjectForward : RowArrays {
  ProjectForward(py::handle x, py::handle out_, int32_t device)
      : RowArrays(x, "x", out_, "out", device) {}
};

struct ProjectBackward : RowArrays {
  Array g;
  View g_view;

  ProjectBackward(py::handle g_, py::handle p, py::handle dx, int32_t device)
      : RowArrays(p, "p", dx, "dx", device), g(g_, "g", 2, device) {
    g_view = canonical(g.view());
    check(bool(g_view), "g must be given");
    check_matrix(g_view, "g", a_view, false);
    check(g_view.col_stride == 1, "g must have inner stride 1");
    check_one_device({&g, &a});
  }
};

void sparsemax_forward(py::handle x, py::handle out, int threads) {
  const ProjectForward in(x, out, kCpu);
  released(threads,
           [&](const Run& run) { mmfast::sparsemax_forward(in.a_view, in.out_view, run); });
}

void sparsemax_backward(py::handle g, py::handle p, py::handle dx, int threads) {
  const ProjectBackward in(g, p, dx, kCpu);
  released(threads, [&](const Run& run) {
    mmfast::sparsemax_backward(in.g_view, in.a_view, in.out_view, run);
  });
}

// "no", or by which CUDA and for which cards
constexpr std::string_view kCudaBuild = MMFAST_CUDA_BUILD;

// body(), which queues work on the arrays' card and waits for none of it, without the GIL. Where
// there is no CUDA, `body` names functions that do not exist: it must stay a template.
template <class Arrays, class... Handles, class Body>
void on_card(uintptr_t stream, Body body, Handles... handles) {
  if constexpr (kCudaBuild == "no") {
    throw std::runtime_error("this build of mmfast._C has no CUDA");
  } else {
    const Arrays in(handles..., kCuda);
    py::gil_scoped_release release;
    body(in, mmfast::cuda::Queue{in.a.device_id(), reinterpret_cast<void*>(stream)});
  }
}

void slerp_cuda_forward(py::handle a, py::handle b, py::handle lam, py::handle out,
                        uintptr_t stream) {
  on_card<MixForward>(
      stream,
      [](const auto& in, mmfast::cuda::Queue queue) {
        mmfast::cuda::slerp_forward(in.a_view, in.b_view, in.lam_view, in.out_view, queue);
      },
      a, b, lam, out);
}

void slerp_cuda_backward(py::handle g, py::handle a, py::handle b, py::handle lam, py::handle da,
                         py::handle db, py::handle dlam, uintptr_t stream) {
  on_card<MixBackward>(
      stream,
      [](const auto& in, mmfast::cuda::Queue queue) {
        mmfast::cuda::slerp_backward(in.g_view, in.a_view, in.b_view, in.lam_view, in.da_view,
                                     in.db_view, in.dlam_view, queue);
      },
      g, a, b, lam, da, db, dlam);
}

void sparsemax_cuda_forward(py::handle x, py::handle out, uintptr_t stream) {
  on_card<ProjectForward>(
      stream,
      [](const auto& in, mmfast::cuda::Queue queue) {
        mmfast::cuda::sparsemax_forward(in.a_view, in.out_view, queue);
      },
      x, out);
}

void sparsemax_cuda_backward(py::handle g, py::handle p, py::handle dx, uintptr_t stream) {
  on_card<ProjectBackward>(
      stream,
      [](const auto& in, mmfast::cuda::Queue queue) {
        mmfast::cuda::sparsemax_backward(in.g_view, in.a_view, in.out_view, queue);
      },
      g, p, dx);
}

double tile_rate(const std::string& type, double seconds, int threads) {
  const std::map<std::string, Type> types = {
      {"float32", Type::f32}, {"float64", Type::f64}, {"bfloat16", Type::bf16}};
  check(types.count(type), "dtype must be float32, float64 or bfloat16, got " + type);
  check(threads >= 1, "threads must be at least 1");
  py::gil_scoped_release release;
  return mmfast::tile_rate(types.at(type), seconds, threads);
}

double multiply_add_rate(double seconds, int threads) {
  check(threads >= 1, "threads must be at least 1");
  py::gil_scoped_release release;
  return mmfast::multiply_add_rate(seconds, threads);
}

std::map<std::string, std::string> build_info() {
  return {{"compiler", MMFAST_COMPILER}, {"version", MMFAST_VERSION}, {"cuda", MMFAST_CUDA_BUILD}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of mmfast; mmfast.ops is its API.";
  mmfast::set_isa("");
  m.def("isa", &mmfast::isa);
  m.def("isa_levels", &mmfast::isa_levels);
  m.def(
      "set_isa",
      [](const std::string& level) {
        check(!level.empty(), "CPU level must be named");
        mmfast::set_isa(level);
      },
      py::arg("level"));
  m.def("build_info", &build_info);
  m.def("tile_rate", &tile_rate, py::arg("dtype"), py::arg("seconds"), py::arg("threads"));
  m.def("multiply_add_rate", &multiply_add_rate, py::arg("seconds"), py::arg("threads"));
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
  m.def("fdt_pool_forward", &fdt_pool_forward, py::arg("tokens"), py::arg("codebook"),
        py::arg("scale"), py::arg("mask"), py::arg("normalize"), py::arg("padded_score"),
        py::arg("pooled"), py::arg("weights"), py::arg("winners"), py::arg("threads"));
  m.def("fdt_pool_backward", &fdt_pool_backward, py::arg("g_pooled"), py::arg("g_weights"),
        py::arg("tokens"), py::arg("codebook"), py::arg("scale"), py::arg("normalize"),
        py::arg("weights"), py::arg("winners"), py::arg("d_tokens"), py::arg("d_codebook"),
        py::arg("need_scale"), py::arg("threads"));
  m.def("pairwise_stats", &pairwise_stats, py::arg("x"), py::arg("y"), py::arg("edges"),
        py::arg("pivot"), py::arg("counts"), py::arg("threads"));
  m.def("pairwise_rank", &pairwise_rank, py::arg("q"), py::arg("k"), py::arg("threshold"),
        py::arg("q_ids"), py::arg("k_ids"), py::arg("largest"), py::arg("index"), py::arg("above"),
        py::arg("threads"));
  m.def("shift_landscape", &shift_landscape, py::arg("x"), py::arg("x_inverse"),
        py::arg("x_offsets"), py::arg("x_factors"), py::arg("y"), py::arg("y_inverse"),
        py::arg("y_offsets"), py::arg("y_factors"), py::arg("scales"), py::arg("chunk"),
        py::arg("rows"), py::arg("columns"), py::arg("threads"));
  m.def("slerp_forward", &slerp_forward, py::arg("a"), py::arg("b"), py::arg("lam"), py::arg("out"),
        py::arg("threads"));
  m.def("slerp_backward", &slerp_backward, py::arg("g"), py::arg("a"), py::arg("b"), py::arg("lam"),
        py::arg("da"), py::arg("db"), py::arg("dlam"), py::arg("threads"));
  m.def("slerp_cuda_forward", &slerp_cuda_forward, py::arg("a"), py::arg("b"), py::arg("lam"),
        py::arg("out"), py::arg("stream"));
  m.def("slerp_cuda_backward", &slerp_cuda_backward, py::arg("g"), py::arg("a"), py::arg("b"),
        py::arg("lam"), py::arg("da"), py::arg("db"), py::arg("dlam"), py::arg("stream"));
  m.def("sparsemax_forward", &sparsemax_forward, py::arg("x"), py::arg("out"), py::arg("threads"));
  m.def("sparsemax_backward", &sparsemax_backward, py::arg("g"), py::arg("p"), py::arg("dx"),
        py::arg("threads"));
  m.def("sparsemax_cuda_forward", &sparsemax_cuda_forward, py::arg("x"), py::arg("out"),
        py::arg("stream"));
  m.def("sparsemax_cuda_backward", &sparsemax_cuda_backward, py::arg("g"), py::arg("p"),
        py::arg("dx"), py::arg("stream"));
}

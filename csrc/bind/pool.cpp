// Pooling over a codebook.
#include <map>

#include "border.h"

namespace mmfast::border {
namespace {

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
    if (x.type != codes.type || !floating(x.type)) {
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

}  // namespace

void define_pool(py::module_& m) {
  m.def("fdt_pool_forward", &fdt_pool_forward, py::arg("tokens"), py::arg("codebook"),
        py::arg("scale"), py::arg("mask"), py::arg("normalize"), py::arg("padded_score"),
        py::arg("pooled"), py::arg("weights"), py::arg("winners"), py::arg("threads"));
  m.def("fdt_pool_backward", &fdt_pool_backward, py::arg("g_pooled"), py::arg("g_weights"),
        py::arg("tokens"), py::arg("codebook"), py::arg("scale"), py::arg("normalize"),
        py::arg("weights"), py::arg("winners"), py::arg("d_tokens"), py::arg("d_codebook"),
        py::arg("need_scale"), py::arg("threads"));
}

}  // namespace mmfast::border

// Ops that visit rows, on the CPU and on a card.
#include <initializer_list>
#include <string_view>

#include "../cuda/ops.h"
#include "border.h"

namespace mmfast::border {
namespace {

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
    if (!floating(a_view.type)) {
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
    if (!floating(a_view.type)) {
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

}  // namespace

void define_rows(py::module_& m) {
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

}  // namespace mmfast::border

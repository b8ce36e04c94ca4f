#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "../dlpack.h"
#include "../ops.h"

// What every op's border does: arrays in, what memory safety needs checked, GIL released, call.
namespace mmfast::border {

namespace py = pybind11;
using dlpack::Array;
using dlpack::kCpu;
using dlpack::kCuda;

inline void check(bool good, const std::string& message) {
  if (!good) throw py::value_error(message);
}

inline bool floating(Type type) {
  return type != Type::i64 && type != Type::i32 && type != Type::b8;
}

// Element type of results: what the kernels accumulate in.
inline Type wide(Type type) { return type == Type::f64 ? Type::f64 : Type::f32; }

inline void check_vector(const View& x, const char* name, long length, Type type) {
  if (!x) return;
  check(x.rows == length, std::string(name) + " must have " + std::to_string(length) +
                              " elements, got " + std::to_string(x.rows));
  if (x.type != type) throw py::type_error(std::string(name) + " has the wrong element type");
}

inline void check_matrix(const View& x, const char* name, const View& like, bool contiguous) {
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
inline View canonical(View x) {
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
    if (a.type != b.type || !floating(a.type)) {
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
  } catch (const Stopped&) {
    throw py::error_already_set();
  }
}

// Each file's functions, put into the module.
void define_pairs(py::module_& m);
void define_pool(py::module_& m);
void define_rows(py::module_& m);

}  // namespace mmfast::border

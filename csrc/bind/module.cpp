// The module _C. This folder alone sees pybind11.
#include <map>

#include "../levels.h"
#include "border.h"

namespace mmfast::border {
namespace {

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
}  // namespace mmfast::border

PYBIND11_MODULE(_C, m) {
  using namespace mmfast::border;
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
  define_pairs(m);
  define_pool(m);
  define_rows(m);
}

#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "view.h"

// Arrays from any library that speaks DLPack (torch, numpy, cupy, jax), without linking one.
// Layouts as in https://dmlc.github.io/dlpack/latest/c_api.html (versions 0.x and 1.x).
namespace mmfast::dlpack {

struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

enum : int32_t { kCpu = 1, kCuda = 2 };
enum : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

inline Type type_of(DataType t, const std::string& name) {
  if (t.lanes == 1) {
    if (t.code == kFloat && t.bits == 32) return Type::f32;
    if (t.code == kFloat && t.bits == 64) return Type::f64;
    if (t.code == kFloat && t.bits == 16) return Type::f16;
    if (t.code == kBfloat && t.bits == 16) return Type::bf16;
    if (t.code == kInt && t.bits == 64) return Type::i64;
    if (t.code == kInt && t.bits == 32) return Type::i32;
    if (t.code == kBool && t.bits == 8) return Type::b8;
  }
  throw pybind11::type_error(name + ": this element type is not supported");
}

// Keeps an exported array alive, and its memory in view, until it goes out of scope.
class Array {
 public:
  Array(const pybind11::handle& object, const char* name, int dims, int32_t device = kCpu) {
    if (object.is_none()) return;
    namespace py = pybind11;
    const std::string label = name;
    const std::string misplaced =
        label + (device == kCpu ? " must be on the CPU" : " must be on a CUDA device");
    if (device == kCpu) {
      capsule_ = object.attr("__dlpack__")();
    } else {
      // asked first: only an array on a card may be told of a stream; -1 waits for none
      const py::tuple where = object.attr("__dlpack_device__")();
      if (where[0].cast<int>() != device) throw py::value_error(misplaced);
      capsule_ = object.attr("__dlpack__")(py::arg("stream") = -1);
    }
    auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
    if (!managed) throw py::error_already_set();
    const Tensor& t = managed->tensor;
    if (t.device.type != device) throw py::value_error(misplaced);
    device_id_ = t.device.id;
    if (t.ndim != dims) {
      throw py::value_error(label + " must have " + std::to_string(dims) + " dimensions, got " +
                            std::to_string(t.ndim));
    }
    view_.type = type_of(t.dtype, label);
    view_.data = static_cast<char*>(t.data) + t.byte_offset;
    view_.rows = t.shape[0];
    view_.cols = dims == 2 ? t.shape[1] : 1;
    view_.row_stride = t.strides ? t.strides[0] : view_.cols;
    view_.col_stride = dims == 2 ? (t.strides ? t.strides[1] : 1) : 1;
  }
  const View& view() const { return view_; }
  int device_id() const { return device_id_; }

 private:
  pybind11::object capsule_;  // not renamed, so its own destructor frees what it holds
  View view_;
  int device_id_ = 0;
};

}  // namespace mmfast::dlpack

// How an operation joins the Python module: its file in this folder binds it and registers itself.
//
//   const Binding normal_binding([](py::module_& module) { module.def("normal_cpu", ...); });
//
// All are compiled as one (CMakeLists.txt: pybind11 would take its time in each), so what a file
// defines for itself has the operation in its name.
//
// Bindings convert integers to pointers and check nothing: device, dtype, layout and lifetime are
// checked in Python, by the op that calls. An address is 0 where an argument is not given. CUDA's
// are device addresses, and a stream is the integer that torch calls cuda_stream.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>

namespace fastdiff {

namespace py = pybind11;

struct Binding {
  explicit Binding(void (*bind)(py::module_& module));  // called when the module is imported
};

template <typename T = void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Runs a kernel that counts the floats of workspace it needs when it is given none; they are freed
// when it is done.
template <typename Kernel, typename Shape, typename Call>
void run_with_workspace(const Kernel& kernel, const Shape& shape, const Call& call, int threads) {
  const int64_t floats = kernel(shape, call, nullptr, threads);
  const std::unique_ptr<float[]> workspace(new float[static_cast<size_t>(floats) + 1]);
  kernel(shape, call, workspace.get(), threads);
}

}  // namespace fastdiff

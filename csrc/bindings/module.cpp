// The one Python module: what the library is made of, and what each file of this folder binds.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../cpu/isa.h"
#include "binding.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef FASTDIFF_CUDA_ARCHS
#include "../cuda/device_limits.h"
#include "../cuda/runtime.h"
#endif

namespace fastdiff {
namespace {

// Raised with every change of a binding's arguments or meaning; fastdiff/ops/native.py compares it, so
// that sources and a library built from older ones do not meet unnoticed.
constexpr int kInterface = 9;

py::dict build_info() {
  py::dict info;
  info["compiler"] = FASTDIFF_COMPILER;
  info["pybind11"] = FASTDIFF_PYBIND11;
  info["isas"] = cpu::compiled_isas();
  info["sanitize"] = FASTDIFF_SANITIZE;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
#ifdef FASTDIFF_CUDA_ARCHS
  info["cuda"] = cuda::runtime_version();
  info["cuda_archs"] = FASTDIFF_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = "";
#endif
  return info;
}

int team_size(int threads) {
  int size = 1;
#ifdef _OPENMP
  py::gil_scoped_release unlocked;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp single
    size = omp_get_num_threads();
  }
#else
  (void)threads;
#endif
  return size;
}

// Made by the first file that registers: in what order they are initialised is not defined.
std::vector<void (*)(py::module_&)>& registered() {
  static std::vector<void (*)(py::module_&)> bindings;
  return bindings;
}

}  // namespace

Binding::Binding(void (*bind)(py::module_&)) { registered().push_back(bind); }

PYBIND11_MODULE(_native, module) {
  module.doc() = "fastdiff's native kernels; use them through fastdiff's own modules.";
  module.attr("INTERFACE") = kInterface;
  module.def("build_info", &build_info);
  module.def("supported_isas", &cpu::supported_isas);
  module.def("set_isa", &cpu::set_isa, py::arg("name"));
  module.def("current_isa", &cpu::current_isa);
  module.def("team_size", &team_size, py::arg("threads"));
#ifdef FASTDIFF_CUDA_ARCHS
  module.def("cuda_driver_version", &cuda::driver_version);
  module.def("cuda_limits", [](int device) {
    const cuda::DeviceLimits limits = cuda::device_limits(device);
    return py::make_tuple(limits.multiprocessors, limits.shared_bytes, limits.cluster,
                          limits.l2_bytes);
  });
#endif
  for (const auto bind : registered()) bind(module);
}

}  // namespace fastdiff

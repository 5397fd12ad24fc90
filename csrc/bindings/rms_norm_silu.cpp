#include "../cpu/rms_norm_silu.h"
#include "binding.h"

namespace fastdiff {
namespace {

const Binding rms_norm_silu_binding([](py::module_& module) {
  py::class_<RmsNormShape>(module, "RmsNormShape")
      .def(py::init([](int64_t samples, int64_t channels, int64_t positions, bool channels_last,
                       bool silu, float eps, int dtype, int weight_dtype, int film_dtype,
                       int64_t scale_stride, int64_t shift_stride) {
             return RmsNormShape{samples,
                                 channels,
                                 positions,
                                 channels_last,
                                 silu,
                                 eps,
                                 static_cast<DType>(dtype),
                                 static_cast<DType>(weight_dtype),
                                 static_cast<DType>(film_dtype),
                                 scale_stride,
                                 shift_stride};
           }),
           py::kw_only(), py::arg("samples"), py::arg("channels"), py::arg("positions"),
           py::arg("channels_last"), py::arg("silu"), py::arg("eps"), py::arg("dtype"),
           py::arg("weight_dtype"), py::arg("film_dtype"), py::arg("scale_stride"),
           py::arg("shift_stride"));
  module.def("rms_norm_silu_cpu", [](const RmsNormShape& shape, uintptr_t x, uintptr_t weight,
                                     uintptr_t scale, uintptr_t shift, uintptr_t y, int threads) {
    py::gil_scoped_release unlocked;
    const RmsNormCall call = {at(x), at(weight), at(scale), at(shift), at(y)};
    run_with_workspace(cpu::rms_norm_silu, shape, call, threads);
  });
});

}  // namespace
}  // namespace fastdiff

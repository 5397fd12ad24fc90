#include "../cpu/norm_coefficients.h"

#include "binding.h"

namespace fastdiff {
namespace {

const Binding norm_coefficients_binding([](py::module_& module) {
  py::class_<NormCoefficientsShape>(module, "NormCoefficientsShape")
      .def(py::init([](int64_t samples, int64_t channels, int64_t second_channels, int64_t groups,
                       float eps, int64_t film_stride) {
             return NormCoefficientsShape{samples, channels, second_channels,
                                          groups,  eps,      film_stride};
           }),
           py::kw_only(), py::arg("samples"), py::arg("channels"), py::arg("second_channels"),
           py::arg("groups"), py::arg("eps"), py::arg("film_stride"));
  module.def("norm_coefficients_cpu",
             [](const NormCoefficientsShape& shape, uintptr_t moments, uintptr_t second,
                uintptr_t weight, uintptr_t bias, uintptr_t scale, uintptr_t shift,
                uintptr_t coefficients, int) {
               py::gil_scoped_release unlocked;
               cpu::norm_coefficients(shape, {at<const float>(moments), at<const float>(second),
                                              at<const float>(weight), at<const float>(bias),
                                              at<const float>(scale), at<const float>(shift),
                                              at<float>(coefficients)});
             });
});

}  // namespace
}  // namespace fastdiff

#include "../cpu/convolution.h"

#include "../cpu/convolution_weight_gradient.h"
#include "binding.h"

namespace fastdiff {
namespace {

const Binding convolution_binding([](py::module_& module) {
  py::class_<ConvolutionShape>(module, "ConvolutionShape")
      .def(py::init([](int64_t samples, int64_t channels, int64_t second_channels, int64_t height,
                       int64_t width, int64_t out_channels, int64_t out_height, int64_t out_width,
                       int64_t kernel_height, int64_t kernel_width, int64_t stride, int64_t padding,
                       bool upsample, bool folded, bool silu, int dtype, int products,
                       int64_t add_stride) {
             return ConvolutionShape{samples,
                                     channels,
                                     second_channels,
                                     height,
                                     width,
                                     out_channels,
                                     out_height,
                                     out_width,
                                     kernel_height,
                                     kernel_width,
                                     stride,
                                     padding,
                                     upsample,
                                     folded,
                                     silu,
                                     static_cast<DType>(dtype),
                                     static_cast<Products>(products),
                                     add_stride};
           }),
           py::kw_only(), py::arg("samples"), py::arg("channels"), py::arg("second_channels"),
           py::arg("height"), py::arg("width"), py::arg("out_channels"), py::arg("out_height"),
           py::arg("out_width"), py::arg("kernel_height"), py::arg("kernel_width"),
           py::arg("stride"), py::arg("padding"), py::arg("upsample"), py::arg("folded"),
           py::arg("silu"), py::arg("dtype"), py::arg("products"), py::arg("add_stride"));
  module.def("convolution_serves",
             [](int products) { return cpu::convolution_serves(static_cast<Products>(products)); });
  module.def("convolution_pays",
             [](int products) { return cpu::convolution_pays(static_cast<Products>(products)); });
  module.def("convolution_panels", [](int products, int64_t out_channels, int64_t channels,
                                      int64_t taps) {
    return cpu::convolution_panels(static_cast<Products>(products), out_channels, channels, taps);
  });
  module.def("pack_convolution_cpu",
             [](int products, uintptr_t values, int64_t out_channels, int64_t channels,
                int64_t taps, int64_t out_stride, int64_t channel_stride, int64_t tap_stride,
                uintptr_t panels, int threads) {
               py::gil_scoped_release unlocked;
               cpu::pack_convolution(static_cast<Products>(products),
                                     {at<const float>(values), out_channels, channels, taps,
                                      out_stride, channel_stride, tap_stride},
                                     at(panels), threads);
             });
  module.def("convolution_workspace", [](const ConvolutionShape& shape, bool moments, int threads) {
    ConvolutionCall call = {};
    float wanted = 0.0f;
    call.moments = moments ? &wanted : nullptr;
    return cpu::convolution(shape, call, nullptr, threads);
  });
  module.def("convolution_cpu", [](const ConvolutionShape& shape, uintptr_t x, uintptr_t second,
                                   uintptr_t coefficients, uintptr_t panels, uintptr_t bias,
                                   uintptr_t add, uintptr_t residual, uintptr_t y,
                                   uintptr_t moments, uintptr_t workspace, int threads) {
    py::gil_scoped_release unlocked;
    const ConvolutionCall call = {at(x),
                                  at(second),
                                  at<const float>(coefficients),
                                  at(panels),
                                  at<const float>(bias),
                                  at<const float>(add),
                                  at(residual),
                                  at(y),
                                  at<float>(moments)};
    cpu::convolution(shape, call, at<float>(workspace), threads);
  });
  module.def("convolution_weight_gradient_workspace",
             [](const ConvolutionShape& shape, int threads) {
               return cpu::convolution_weight_gradient(shape, {}, nullptr, threads);
             });
  module.def("convolution_weight_gradient_cpu",
             [](const ConvolutionShape& shape, uintptr_t x, uintptr_t dy, uintptr_t dw,
                uintptr_t db, int64_t out_stride, int64_t channel_stride, int64_t tap_stride,
                uintptr_t workspace, int threads) {
               py::gil_scoped_release unlocked;
               cpu::convolution_weight_gradient(shape,
                                                {at(x), at(dy), at<float>(dw), at<float>(db),
                                                 out_stride, channel_stride, tap_stride},
                                                at<float>(workspace), threads);
             });
});

}  // namespace
}  // namespace fastdiff

#include "../cpu/normal.h"
#include "binding.h"
#ifdef FASTDIFF_CUDA_ARCHS
#include "../cuda/normal.h"
#endif

namespace fastdiff {
namespace {

NormalFill normal_fill(uintptr_t out, int dtype, int64_t samples, int64_t channels, int64_t spatial,
                       int64_t sample_stride, int64_t channel_stride, int64_t spatial_stride,
                       uint64_t seed, uint32_t step, uint64_t first_sample) {
  return {at(out),        static_cast<DType>(dtype),
          samples,        channels,
          spatial,        sample_stride,
          channel_stride, spatial_stride,
          seed,           step,
          first_sample};
}

const Binding normal_binding([](py::module_& module) {
  py::class_<NormalFill>(module, "NormalFill")
      .def(py::init(&normal_fill), py::arg("out"), py::arg("dtype"), py::arg("samples"),
           py::arg("channels"), py::arg("spatial"), py::arg("sample_stride"),
           py::arg("channel_stride"), py::arg("spatial_stride"), py::arg("seed"), py::arg("step"),
           py::arg("first_sample"));
  module.def(
      "normal_cpu",
      [](const NormalFill& fill, int threads) {
        py::gil_scoped_release unlocked;
        cpu::normal(fill, threads);
      },
      py::arg("fill"), py::arg("threads"));
  module.def(
      "philox_cpu",
      [](uintptr_t out, int64_t quads, uint64_t seed, uint32_t step, uint64_t sample,
         uint32_t first_quad) {
        py::gil_scoped_release unlocked;
        cpu::philox(at<uint32_t>(out), quads, seed, step, sample, first_quad);
      },
      py::arg("out"), py::arg("quads"), py::arg("seed"), py::arg("step"), py::arg("sample"),
      py::arg("first_quad"));
#ifdef FASTDIFF_CUDA_ARCHS
  module.def(
      "normal_cuda",
      [](const NormalFill& fill, uintptr_t seed, uintptr_t step, uintptr_t first_sample, bool exact,
         uintptr_t stream) {
        const cuda::DeviceCounters counters = {at<const uint64_t>(seed), at<const int64_t>(step),
                                               at<const uint64_t>(first_sample)};
        cuda::normal(fill, counters, exact, at(stream));
      },
      py::arg("fill"), py::arg("seed_address"), py::arg("step_address"),
      py::arg("first_sample_address"), py::arg("exact"), py::arg("stream"));
  module.def(
      "philox_cuda",
      [](uintptr_t out, int64_t quads, uint64_t seed, uint32_t step, uint64_t sample,
         uint32_t first_quad, uintptr_t stream) {
        cuda::philox(at<uint32_t>(out), quads, seed, step, sample, first_quad, at(stream));
      },
      py::arg("out"), py::arg("quads"), py::arg("seed"), py::arg("step"), py::arg("sample"),
      py::arg("first_quad"), py::arg("stream"));
#endif
});

}  // namespace
}  // namespace fastdiff

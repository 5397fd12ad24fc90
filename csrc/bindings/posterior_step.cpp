#include "../cpu/posterior_step.h"
#include "binding.h"
#include "elementwise.h"
#ifdef FASTDIFF_CUDA_ARCHS
#include "../cuda/posterior_step.h"
#endif

namespace fastdiff {
namespace {

const Binding posterior_step_binding([](py::module_& module) {
  py::class_<PosteriorStep>(module, "PosteriorStep")
      .def(py::init([](const ShapeTuple& shape, int64_t rows, const LayoutTuple& x_t,
                       const LayoutTuple& output, int64_t variance_offset, int64_t guidance_offset,
                       const LayoutTuple& unconditional, const LayoutTuple& noise,
                       const LayoutTuple& memory0, const LayoutTuple& memory1,
                       const LayoutTuple& memory2, const LayoutTuple& x_prev,
                       const LayoutTuple& x_start) {
             return PosteriorStep{shape_of(shape),
                                  rows,
                                  layout_of(x_t),
                                  layout_of(output),
                                  variance_offset,
                                  guidance_offset,
                                  layout_of(unconditional),
                                  layout_of(noise),
                                  {layout_of(memory0), layout_of(memory1), layout_of(memory2)},
                                  layout_of(x_prev),
                                  layout_of(x_start)};
           }),
           py::arg("shape"), py::arg("rows"), py::arg("x_t"), py::arg("output"),
           py::arg("variance_offset"), py::arg("guidance_offset"), py::arg("unconditional"),
           py::arg("noise"), py::arg("memory0"), py::arg("memory1"), py::arg("memory2"),
           py::arg("x_prev"), py::arg("x_start"));
  module.def(
      "posterior_step_cpu",
      [](const PosteriorStep& plan, uintptr_t x_t, uintptr_t output, uintptr_t table,
         uintptr_t noise, uintptr_t memory0, uintptr_t memory1, uintptr_t memory2,
         uintptr_t unconditional, uintptr_t guidance_address, uintptr_t output_scale,
         uintptr_t x_prev, uintptr_t x_start, bool keeps, int64_t step, uintptr_t step_address,
         bool step_is_wide, float guidance, bool draws, uint64_t seed, uint32_t first_step,
         uint64_t first_sample, int threads) {
        const PosteriorStepCall call = {at(x_t),
                                        at(output),
                                        at<float>(table),
                                        at(unconditional),
                                        at<float>(output_scale),
                                        at(noise),
                                        {at(memory0), at(memory1), at(memory2)},
                                        keeps,
                                        at(x_prev),
                                        at(x_start),
                                        step,
                                        at(step_address),
                                        step_is_wide,
                                        guidance,
                                        at<float>(guidance_address),
                                        draws,
                                        seed,
                                        first_step,
                                        first_sample};
        py::gil_scoped_release unlocked;
        return cpu::posterior_step(plan, call, threads);
      });
#ifdef FASTDIFF_CUDA_ARCHS
  module.def(
      "posterior_step_cuda",
      [](const PosteriorStep& plan, uintptr_t x_t, uintptr_t output, uintptr_t table,
         uintptr_t noise, uintptr_t memory0, uintptr_t memory1, uintptr_t memory2,
         uintptr_t unconditional, uintptr_t guidance_address, uintptr_t output_scale,
         uintptr_t x_prev, uintptr_t x_start, bool keeps, int64_t step, uintptr_t step_address,
         bool step_is_wide, float guidance, bool draws, uint64_t seed, uintptr_t seed_address,
         uint32_t first_step, uint64_t first_sample, uintptr_t first_sample_address,
         int multiprocessors, uintptr_t stream) {
        const PosteriorStepCall call = {at(x_t),
                                        at(output),
                                        at<float>(table),
                                        at(unconditional),
                                        at<float>(output_scale),
                                        at(noise),
                                        {at(memory0), at(memory1), at(memory2)},
                                        keeps,
                                        at(x_prev),
                                        at(x_start),
                                        step,
                                        at(step_address),
                                        step_is_wide,
                                        guidance,
                                        at<float>(guidance_address),
                                        draws,
                                        seed,
                                        first_step,
                                        first_sample};
        cuda::posterior_step(plan, call, at<const uint64_t>(seed_address),
                             at<const uint64_t>(first_sample_address),
                             {multiprocessors, at(stream)});
      });
#endif
});

}  // namespace
}  // namespace fastdiff

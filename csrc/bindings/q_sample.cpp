#include "../cpu/q_sample.h"
#include "binding.h"
#include "elementwise.h"
#ifdef FASTDIFF_CUDA_ARCHS
#include "../cuda/q_sample.h"
#endif

namespace fastdiff {
namespace {

const Binding q_sample_binding([](py::module_& module) {
  py::class_<QSample>(module, "QSample")
      .def(py::init([](const ShapeTuple& shape, int64_t rows, const LayoutTuple& x_start,
                       const LayoutTuple& noise, const LayoutTuple& x_t) {
             return QSample{shape_of(shape), rows, layout_of(x_start), layout_of(noise),
                            layout_of(x_t)};
           }),
           py::arg("shape"), py::arg("rows"), py::arg("x_start"), py::arg("noise"), py::arg("x_t"));
  module.def("q_sample_cpu", [](const QSample& plan, uintptr_t x_start, uintptr_t t,
                                uintptr_t signal, uintptr_t sigma, uintptr_t noise, uintptr_t x_t,
                                bool draws, uint64_t seed, uint32_t step, uint64_t first_sample,
                                int threads) {
    const QSampleCall call = {
        at(x_start), at<int64_t>(t), at<float>(signal), at<float>(sigma), at(noise), at(x_t), draws,
        seed,        step,           first_sample};
    py::gil_scoped_release unlocked;
    return cpu::q_sample(plan, call, threads);
  });
#ifdef FASTDIFF_CUDA_ARCHS
  module.def("q_sample_cuda", [](const QSample& plan, uintptr_t x_start, uintptr_t t,
                                 uintptr_t signal, uintptr_t sigma, uintptr_t noise, uintptr_t x_t,
                                 bool draws, uint64_t seed, uintptr_t seed_address, uint32_t step,
                                 uintptr_t step_address, uint64_t first_sample,
                                 uintptr_t first_sample_address, int multiprocessors,
                                 uintptr_t stream) {
    const QSampleCall call = {
        at(x_start), at<int64_t>(t), at<float>(signal), at<float>(sigma), at(noise), at(x_t), draws,
        seed,        step,           first_sample};
    cuda::q_sample(plan, call,
                   {at<const uint64_t>(seed_address), at<const int64_t>(step_address),
                    at<const uint64_t>(first_sample_address)},
                   {multiprocessors, at(stream)});
  });
#endif
});

}  // namespace
}  // namespace fastdiff

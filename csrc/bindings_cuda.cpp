// Bindings of the CUDA launchers. Addresses are device addresses, as integers; a stream is the
// integer that torch calls cuda_stream.
#include "bindings_cuda.h"

#include <cstdint>

#include "bindings_calls.h"
#include "cuda/kernels.h"
#ifdef FASTDIFF_EMULATION
#include "common/philox.h"
#include "emulation/cuda_runtime.h"
#endif

namespace py = pybind11;

namespace fastdiff {
namespace {

void bind_noise(py::module_& module) {
  module.def(
      "normal_cuda",
      [](const NormalFill& fill, uintptr_t seed, uintptr_t step, uintptr_t first_sample,
         uintptr_t stream) {
        const cuda::DeviceCounters counters = {at<const uint64_t>(seed), at<const int64_t>(step),
                                               at<const uint64_t>(first_sample)};
        cuda::normal(fill, counters, at(stream));
      },
      py::arg("fill"), py::arg("seed_address"), py::arg("step_address"),
      py::arg("first_sample_address"), py::arg("stream"));
  module.def(
      "philox_cuda",
      [](uintptr_t out, int64_t quads, uint64_t seed, uint32_t step, uint64_t sample,
         uint32_t first_quad, uintptr_t stream) {
        cuda::philox(at<uint32_t>(out), quads, seed, step, sample, first_quad, at(stream));
      },
      py::arg("out"), py::arg("quads"), py::arg("seed"), py::arg("step"), py::arg("sample"),
      py::arg("first_quad"), py::arg("stream"));
}

void bind_group_norm(py::module_& module) {
  module.def("group_norm_silu_cuda",
             [](const GroupNormShape& shape, const cuda::GroupNormTile& tile, uintptr_t x,
                uintptr_t weight, uintptr_t bias, uintptr_t scale, uintptr_t shift, uintptr_t add,
                uintptr_t y, uintptr_t statistics, uintptr_t workspace, uintptr_t stream) {
               const GroupNormForward call =
                   group_norm_forward(shape, x, weight, bias, scale, shift, add, y, statistics);
               cuda::group_norm_silu(shape, call, tile, at<float>(workspace), at(stream));
             });
  module.def(
      "group_norm_silu_backward_cuda",
      [](const GroupNormShape& shape, const cuda::GroupNormTile& tile, uintptr_t dy, uintptr_t x,
         uintptr_t weight, uintptr_t bias, uintptr_t scale, uintptr_t shift, uintptr_t add,
         uintptr_t statistics, uintptr_t dx, uintptr_t dweight, uintptr_t dbias, uintptr_t dscale,
         uintptr_t dshift, uintptr_t dadd, uintptr_t workspace, uintptr_t stream) {
        const GroupNormBackward call =
            group_norm_backward(shape, dy, x, weight, bias, scale, shift, add, statistics, dx,
                                dweight, dbias, dscale, dshift, dadd);
        cuda::group_norm_silu_backward(shape, call, tile, at<float>(workspace), at(stream));
      });
}

// What csrc/bindings.cpp binds for the CPU, with addresses for what a graph may change.
void bind_elementwise(py::module_& module) {
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
  module.def("posterior_step_cuda",
             [](const PosteriorStep& plan, uintptr_t x_t, uintptr_t output, uintptr_t table,
                uintptr_t noise, uintptr_t prev_x_start, uintptr_t x_prev, uintptr_t x_start,
                int64_t step, uintptr_t step_address, bool step_is_wide, float guidance,
                uintptr_t guidance_address, bool draws, uint64_t seed, uintptr_t seed_address,
                uint32_t first_step, uint64_t first_sample, uintptr_t first_sample_address,
                int multiprocessors, uintptr_t stream) {
               const PosteriorStepCall call = {at(x_t),
                                               at(output),
                                               at<float>(table),
                                               at(noise),
                                               at(prev_x_start),
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
}

#ifdef FASTDIFF_EMULATION
void bind_emulation(py::module_& module) {
  module.def("set_emulation_order", &emulation::set_order, py::arg("seed"));
  module.def(
      "emulate_device",
      [](int64_t multiprocessors, int64_t shared_bytes, int64_t cluster, int64_t l2_bytes) {
        emulation::device = {multiprocessors, shared_bytes, cluster, l2_bytes};
      },
      py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("cluster"), py::arg("l2_bytes"));
  module.def("limit_emulated_grid", &emulation::limit_grid, py::arg("blocks"));
  // Bytes that accesses with a cache hint have loaded and stored since the last call.
  module.def("emulated_traffic", [] {
    const emulation::Traffic since = emulation::traffic;
    emulation::traffic = {};
    return py::make_tuple(since.loaded, since.stored);
  });
  // The arithmetic of csrc/common on words of the caller's choice.
  module.def("box_muller", [](uint32_t word0, uint32_t word1) {
    float n0, n1;
    box_muller<float>(word0, word1, &n0, &n1);
    return py::make_tuple(n0, n1);
  });
}
#endif

}  // namespace

void bind_cuda(py::module_& module) {
  module.def("cuda_driver_version", &cuda::driver_version);
  module.def("cuda_limits", [](int device) {
    const cuda::DeviceLimits limits = cuda::device_limits(device);
    return py::make_tuple(limits.multiprocessors, limits.shared_bytes, limits.cluster,
                          limits.l2_bytes);
  });
  bind_noise(module);
  bind_group_norm(module);
  bind_elementwise(module);
#ifdef FASTDIFF_EMULATION
  bind_emulation(module);
#endif
}

}  // namespace fastdiff

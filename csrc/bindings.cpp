// The one Python module. It converts integers to pointers and checks nothing: device, dtype,
// layout and lifetime are checked in Python, by the op that calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef FASTDIFF_CUDA_ARCHS
#include "cuda/kernels.h"
#endif

namespace py = pybind11;
using namespace fastdiff;

namespace {

// Raised with every change of a binding's arguments or meaning; fastdiff/native.py compares it, so
// that sources and a library built from older ones do not meet unnoticed.
constexpr int kInterface = 2;

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

NormalFill normal_fill(uintptr_t out, int dtype, int64_t samples, int64_t channels, int64_t spatial,
                       int64_t sample_stride, int64_t channel_stride, int64_t spatial_stride,
                       uint64_t seed, uint32_t step, uint64_t first_sample) {
  return {reinterpret_cast<void*>(out),
          static_cast<DType>(dtype),
          samples,
          channels,
          spatial,
          sample_stride,
          channel_stride,
          spatial_stride,
          seed,
          step,
          first_sample};
}

using Strides = std::array<int64_t, 3>;  // of (samples, channels, tokens)

TokenTensor token_tensor(uintptr_t data, const Strides& strides) {
  return {reinterpret_cast<void*>(data), strides[0], strides[1], strides[2]};
}

Attention attention(int dtype, int64_t samples, int64_t heads, int64_t tokens, int64_t head_dim,
                    int64_t head_rows, int64_t part_rows, uintptr_t qkv, const Strides& qkv_strides,
                    uintptr_t out, const Strides& out_strides, uintptr_t lse) {
  Attention attention = {};
  attention.dtype = static_cast<DType>(dtype);
  attention.samples = samples;
  attention.heads = heads;
  attention.tokens = tokens;
  attention.head_dim = head_dim;
  attention.head_rows = head_rows;
  attention.part_rows = part_rows;
  attention.qkv = token_tensor(qkv, qkv_strides);
  attention.out = token_tensor(out, out_strides);
  attention.lse = reinterpret_cast<float*>(lse);
  return attention;
}

void bind_attention(py::module_& module) {
  py::class_<Attention>(module, "Attention").def(py::init(&attention));
  module.def("attention_workspace",
             [](const Attention& attention, bool for_backward, int threads) {
               return cpu::current_kernels().attention_workspace(attention, for_backward, threads);
             });
  module.def("attention_forward_cpu",
             [](Attention attention, uintptr_t workspace, int threads) {
               py::gil_scoped_release unlocked;
               attention.workspace = reinterpret_cast<float*>(workspace);
               cpu::current_kernels().attention_forward(attention, threads);
             });
  module.def("attention_backward_cpu",
             [](Attention attention, uintptr_t grad_out, const Strides& grad_out_strides,
                uintptr_t grad_qkv, const Strides& grad_qkv_strides, uintptr_t workspace,
                int threads) {
               py::gil_scoped_release unlocked;
               attention.grad_out = token_tensor(grad_out, grad_out_strides);
               attention.grad_qkv = token_tensor(grad_qkv, grad_qkv_strides);
               attention.workspace = reinterpret_cast<float*>(workspace);
               cpu::current_kernels().attention_backward(attention, threads);
             });
}

void bind_cpu(py::module_& module) {
  module.def("supported_isas", &cpu::supported_isas);
  module.def("set_isa", &cpu::set_isa, py::arg("name"));
  module.def("current_isa", &cpu::current_isa);
  module.def("team_size", &team_size, py::arg("threads"));

  module.def(
      "normal_cpu", [](const NormalFill& fill, int threads) {
        py::gil_scoped_release unlocked;
        cpu::current_kernels().normal(fill, threads);
      },
      py::arg("fill"), py::arg("threads"));
  module.def(
      "philox_cpu",
      [](uintptr_t out, int64_t quads, uint64_t seed, uint32_t step, uint64_t sample,
         uint32_t first_quad) {
        py::gil_scoped_release unlocked;
        cpu::current_kernels().philox(reinterpret_cast<uint32_t*>(out), quads, seed, step, sample,
                                      first_quad);
      },
      py::arg("out"), py::arg("quads"), py::arg("seed"), py::arg("step"), py::arg("sample"),
      py::arg("first_quad"));
}

#ifdef FASTDIFF_CUDA_ARCHS
void check_launch(int error) {
  if (error != 0) throw std::runtime_error(std::string("CUDA: ") + cuda::error_text(error));
}

void bind_cuda(py::module_& module) {
  module.def("cuda_driver_version", &cuda::driver_version);
  module.def(
      "normal_cuda",
      [](const NormalFill& fill, uintptr_t seed, uintptr_t step, uintptr_t stream) {
        const cuda::DeviceCounters counters = {reinterpret_cast<const uint64_t*>(seed),
                                               reinterpret_cast<const int64_t*>(step)};
        check_launch(cuda::normal(fill, counters, reinterpret_cast<void*>(stream)));
      },
      py::arg("fill"), py::arg("seed_address"), py::arg("step_address"), py::arg("stream"));
  module.def(
      "philox_cuda",
      [](uintptr_t out, int64_t quads, uint64_t seed, uint32_t step, uint64_t sample,
         uint32_t first_quad, uintptr_t stream) {
        check_launch(cuda::philox(reinterpret_cast<uint32_t*>(out), quads, seed, step, sample,
                                  first_quad, reinterpret_cast<void*>(stream)));
      },
      py::arg("out"), py::arg("quads"), py::arg("seed"), py::arg("step"), py::arg("sample"),
      py::arg("first_quad"), py::arg("stream"));
}
#endif

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "fastdiff's native kernels; use them through fastdiff's own modules.";
  module.attr("INTERFACE") = kInterface;
  module.def("build_info", &build_info);

  py::class_<NormalFill>(module, "NormalFill")
      .def(py::init(&normal_fill), py::arg("out"), py::arg("dtype"), py::arg("samples"),
           py::arg("channels"), py::arg("spatial"), py::arg("sample_stride"),
           py::arg("channel_stride"), py::arg("spatial_stride"), py::arg("seed"), py::arg("step"),
           py::arg("first_sample"));
  bind_cpu(module);
  bind_attention(module);
#ifdef FASTDIFF_CUDA_ARCHS
  bind_cuda(module);
#endif
}

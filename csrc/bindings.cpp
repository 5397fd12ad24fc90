// The one Python module. It converts integers to pointers and checks nothing: device, dtype,
// layout and lifetime are checked in Python, by the op that calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

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

// dtype, and the strides of sample, channel and position
using LayoutTuple = std::tuple<int, int64_t, int64_t, int64_t>;
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t>;

Layout layout_of(const LayoutTuple& t) {
  return {static_cast<DType>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

Shape shape_of(const ShapeTuple& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_elementwise(py::module_& module) {
  py::class_<QSample>(module, "QSample")
      .def(py::init([](const ShapeTuple& shape, int64_t rows, const LayoutTuple& x_start,
                       const LayoutTuple& noise, const LayoutTuple& x_t) {
             return QSample{shape_of(shape), rows, layout_of(x_start), layout_of(noise),
                            layout_of(x_t)};
           }),
           py::arg("shape"), py::arg("rows"), py::arg("x_start"), py::arg("noise"), py::arg("x_t"));
  py::class_<PosteriorStep>(module, "PosteriorStep")
      .def(py::init([](const ShapeTuple& shape, int64_t rows, const LayoutTuple& x_t,
                       const LayoutTuple& output, int64_t variance_offset, int64_t guidance_offset,
                       const LayoutTuple& noise, const LayoutTuple& prev_x_start,
                       const LayoutTuple& x_prev, const LayoutTuple& x_start) {
             return PosteriorStep{shape_of(shape),     rows,
                                  layout_of(x_t),      layout_of(output),
                                  variance_offset,     guidance_offset,
                                  layout_of(noise),    layout_of(prev_x_start),
                                  layout_of(x_prev),   layout_of(x_start)};
           }),
           py::arg("shape"), py::arg("rows"), py::arg("x_t"), py::arg("output"),
           py::arg("variance_offset"), py::arg("guidance_offset"), py::arg("noise"),
           py::arg("prev_x_start"), py::arg("x_prev"), py::arg("x_start"));
  module.def("q_sample_cpu",
             [](const QSample& plan, uintptr_t x_start, uintptr_t t, uintptr_t signal,
                uintptr_t sigma, uintptr_t noise, uintptr_t x_t, bool draws, uint64_t seed,
                uint32_t step, uint64_t first_sample, int threads) {
               const QSampleCall call = {
                   pointer<void>(x_start),  pointer<int64_t>(t), pointer<float>(signal),
                   pointer<float>(sigma),   pointer<void>(noise), pointer<void>(x_t),
                   draws, seed, step, first_sample};
               py::gil_scoped_release unlocked;
               return cpu::current_kernels().q_sample(plan, call, threads);
             });
  module.def("posterior_step_cpu",
             [](const PosteriorStep& plan, uintptr_t x_t, uintptr_t output, uintptr_t table,
                uintptr_t noise, uintptr_t prev_x_start, uintptr_t x_prev, uintptr_t x_start,
                int64_t step, uintptr_t step_address, bool step_is_wide, float guidance,
                uintptr_t guidance_address, bool draws, uint64_t seed, uint32_t first_step,
                uint64_t first_sample, int threads) {
               const PosteriorStepCall call = {
                   pointer<void>(x_t), pointer<void>(output), pointer<float>(table),
                   pointer<void>(noise), pointer<void>(prev_x_start), pointer<void>(x_prev),
                   pointer<void>(x_start), step, pointer<void>(step_address), step_is_wide,
                   guidance, pointer<float>(guidance_address), draws, seed, first_step,
                   first_sample};
               py::gil_scoped_release unlocked;
               return cpu::current_kernels().posterior_step(plan, call, threads);
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
  bind_elementwise(module);
#ifdef FASTDIFF_CUDA_ARCHS
  bind_cuda(module);
#endif
}

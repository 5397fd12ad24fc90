// The one Python module. It converts integers to pointers and checks nothing: device, dtype,
// layout and lifetime are checked in Python, by the op that calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>

#include "bindings_calls.h"
#include "cpu/isa.h"
#include "cuda/group_norm_tile.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef FASTDIFF_CUDA_ARCHS
#include "bindings_cuda.h"
#include "cuda/kernels.h"
#endif

namespace py = pybind11;
using namespace fastdiff;

namespace {

// Raised with every change of a binding's arguments or meaning; fastdiff/ops/native.py compares it, so
// that sources and a library built from older ones do not meet unnoticed.
constexpr int kInterface = 6;

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
  return {at(out),        static_cast<DType>(dtype),
          samples,        channels,
          spatial,        sample_stride,
          channel_stride, spatial_stride,
          seed,           step,
          first_sample};
}

// Memory of one call; freed when it is over.
std::unique_ptr<float[]> workspace_of(int64_t floats) {
  return std::unique_ptr<float[]>(new float[static_cast<size_t>(floats) + 1]);
}

void bind_group_norm(py::module_& module) {
  py::class_<GroupNormShape>(module, "GroupNormShape")
      .def(py::init([](int64_t samples, int64_t channels, int64_t positions, int64_t groups,
                       bool channels_last, bool silu, float eps, int add, int dtype,
                       int affine_dtype, int film_dtype, int add_dtype, int64_t scale_stride,
                       int64_t shift_stride, int64_t add_stride) {
             return GroupNormShape{samples,
                                   channels,
                                   positions,
                                   groups,
                                   channels_last,
                                   silu,
                                   eps,
                                   static_cast<Add>(add),
                                   static_cast<DType>(dtype),
                                   static_cast<DType>(affine_dtype),
                                   static_cast<DType>(film_dtype),
                                   static_cast<DType>(add_dtype),
                                   scale_stride,
                                   shift_stride,
                                   add_stride};
           }),
           py::kw_only(), py::arg("samples"), py::arg("channels"), py::arg("positions"),
           py::arg("groups"), py::arg("channels_last"), py::arg("silu"), py::arg("eps"),
           py::arg("add"), py::arg("dtype"), py::arg("affine_dtype"), py::arg("film_dtype"),
           py::arg("add_dtype"), py::arg("scale_stride"), py::arg("shift_stride"),
           py::arg("add_stride"));
  py::class_<cuda::GroupNormTile>(module, "GroupNormTile")
      .def_readonly("wide", &cuda::GroupNormTile::wide)
      .def_readonly("resident", &cuda::GroupNormTile::resident)
      .def_readonly("threads", &cuda::GroupNormTile::threads)
      .def_readonly("parts", &cuda::GroupNormTile::parts)
      .def_readonly("lanes", &cuda::GroupNormTile::lanes)
      .def_readonly("channel_parts", &cuda::GroupNormTile::channel_parts)
      .def_readonly("position_parts", &cuda::GroupNormTile::position_parts)
      .def_readonly("part_channels", &cuda::GroupNormTile::part_channels)
      .def_readonly("part_positions", &cuda::GroupNormTile::part_positions)
      .def_readonly("slab_channels", &cuda::GroupNormTile::slab_channels)
      .def_readonly("slabs", &cuda::GroupNormTile::slabs)
      .def_readonly("slabs_at_once", &cuda::GroupNormTile::slabs_at_once)
      .def_readonly("shared_bytes", &cuda::GroupNormTile::shared_bytes)
      .def_readonly("workspace_floats", &cuda::GroupNormTile::workspace_floats)
      .def_readonly("bytes_moved", &cuda::GroupNormTile::bytes_moved);
  // device: multiprocessors, bytes of shared memory to a block, blocks to a cluster, bytes of L2
  module.def(
      "group_norm_tile",
      [](const GroupNormShape& shape, const std::array<int64_t, 4>& device, bool backward,
         bool aligned) {
        const cuda::DeviceLimits limits = {device[0], device[1], device[2], device[3]};
        return cuda::group_norm_tile(shape, limits, backward, aligned);
      },
      py::arg("shape"), py::arg("device"), py::arg("backward"), py::arg("aligned"));
  module.def(
      "group_norm_silu_cpu", [](const GroupNormShape& shape, uintptr_t x, uintptr_t weight,
                                uintptr_t bias, uintptr_t scale, uintptr_t shift, uintptr_t add,
                                uintptr_t y, uintptr_t statistics, int threads) {
        py::gil_scoped_release unlocked;
        const GroupNormForward call =
            group_norm_forward(shape, x, weight, bias, scale, shift, add, y, statistics);
        const auto kernel = cpu::current_kernels().group_norm_silu;
        kernel(shape, call, workspace_of(kernel(shape, call, nullptr, threads)).get(), threads);
      });
  module.def("group_norm_silu_backward_cpu",
             [](const GroupNormShape& shape, uintptr_t dy, uintptr_t x, uintptr_t weight,
                uintptr_t bias, uintptr_t scale, uintptr_t shift, uintptr_t add,
                uintptr_t statistics, uintptr_t dx, uintptr_t dweight, uintptr_t dbias,
                uintptr_t dscale, uintptr_t dshift, uintptr_t dadd, int threads) {
               py::gil_scoped_release unlocked;
               const GroupNormBackward call =
                   group_norm_backward(shape, dy, x, weight, bias, scale, shift, add, statistics,
                                       dx, dweight, dbias, dscale, dshift, dadd);
               const auto kernel = cpu::current_kernels().group_norm_silu_backward;
               kernel(shape, call, workspace_of(kernel(shape, call, nullptr, threads)).get(),
                      threads);
             });
}

void bind_rms_norm(py::module_& module) {
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
    const auto kernel = cpu::current_kernels().rms_norm_silu;
    kernel(shape, call, workspace_of(kernel(shape, call, nullptr, threads)).get(), threads);
  });
}

// dtype, and the strides of sample, channel and position
using LayoutTuple = std::tuple<int, int64_t, int64_t, int64_t>;
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t>;

Layout layout_of(const LayoutTuple& t) {
  return {static_cast<DType>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

Shape shape_of(const ShapeTuple& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }

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
             return PosteriorStep{shape_of(shape),   rows,
                                  layout_of(x_t),    layout_of(output),
                                  variance_offset,   guidance_offset,
                                  layout_of(noise),  layout_of(prev_x_start),
                                  layout_of(x_prev), layout_of(x_start)};
           }),
           py::arg("shape"), py::arg("rows"), py::arg("x_t"), py::arg("output"),
           py::arg("variance_offset"), py::arg("guidance_offset"), py::arg("noise"),
           py::arg("prev_x_start"), py::arg("x_prev"), py::arg("x_start"));
  module.def("q_sample_cpu", [](const QSample& plan, uintptr_t x_start, uintptr_t t,
                                uintptr_t signal, uintptr_t sigma, uintptr_t noise, uintptr_t x_t,
                                bool draws, uint64_t seed, uint32_t step, uint64_t first_sample,
                                int threads) {
    const QSampleCall call = {
        at(x_start), at<int64_t>(t), at<float>(signal), at<float>(sigma), at(noise), at(x_t), draws,
        seed,        step,           first_sample};
    py::gil_scoped_release unlocked;
    return cpu::current_kernels().q_sample(plan, call, threads);
  });
  module.def(
      "posterior_step_cpu",
      [](const PosteriorStep& plan, uintptr_t x_t, uintptr_t output, uintptr_t table,
         uintptr_t noise, uintptr_t prev_x_start, uintptr_t x_prev, uintptr_t x_start, int64_t step,
         uintptr_t step_address, bool step_is_wide, float guidance, uintptr_t guidance_address,
         bool draws, uint64_t seed, uint32_t first_step, uint64_t first_sample, int threads) {
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
        py::gil_scoped_release unlocked;
        return cpu::current_kernels().posterior_step(plan, call, threads);
      });
}

using Strides = std::array<int64_t, 3>;  // of (samples, channels, tokens)

TokenTensor token_tensor(uintptr_t data, const Strides& strides) {
  return {at(data), strides[0], strides[1], strides[2]};
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
  attention.lse = at<float>(lse);
  return attention;
}

void bind_attention(py::module_& module) {
  py::class_<Attention>(module, "Attention").def(py::init(&attention));
  module.def("attention_workspace", [](const Attention& attention, bool for_backward, int threads) {
    return cpu::current_kernels().attention_workspace(attention, for_backward, threads);
  });
  module.def("attention_forward_cpu", [](Attention attention, uintptr_t workspace, int threads) {
    py::gil_scoped_release unlocked;
    attention.workspace = at<float>(workspace);
    cpu::current_kernels().attention_forward(attention, threads);
  });
  module.def(
      "attention_backward_cpu",
      [](Attention attention, uintptr_t grad_out, const Strides& grad_out_strides,
         uintptr_t grad_qkv, const Strides& grad_qkv_strides, uintptr_t workspace, int threads) {
        py::gil_scoped_release unlocked;
        attention.grad_out = token_tensor(grad_out, grad_out_strides);
        attention.grad_qkv = token_tensor(grad_qkv, grad_qkv_strides);
        attention.workspace = at<float>(workspace);
        cpu::current_kernels().attention_backward(attention, threads);
      });
}

void bind_cpu(py::module_& module) {
  module.def("supported_isas", &cpu::supported_isas);
  module.def("set_isa", &cpu::set_isa, py::arg("name"));
  module.def("current_isa", &cpu::current_isa);
  module.def("team_size", &team_size, py::arg("threads"));

  module.def(
      "normal_cpu",
      [](const NormalFill& fill, int threads) {
        py::gil_scoped_release unlocked;
        cpu::current_kernels().normal(fill, threads);
      },
      py::arg("fill"), py::arg("threads"));
  module.def(
      "philox_cpu",
      [](uintptr_t out, int64_t quads, uint64_t seed, uint32_t step, uint64_t sample,
         uint32_t first_quad) {
        py::gil_scoped_release unlocked;
        cpu::current_kernels().philox(at<uint32_t>(out), quads, seed, step, sample, first_quad);
      },
      py::arg("out"), py::arg("quads"), py::arg("seed"), py::arg("step"), py::arg("sample"),
      py::arg("first_quad"));
}

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
  bind_group_norm(module);
  bind_rms_norm(module);
  bind_elementwise(module);
  bind_attention(module);
#ifdef FASTDIFF_CUDA_ARCHS
  bind_cuda(module);
#endif
}

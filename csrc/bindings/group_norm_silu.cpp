#include <pybind11/stl.h>

#include <array>

#include "../cpu/group_norm_silu.h"
#include "../cuda/group_norm_tile.h"
#include "binding.h"
#ifdef FASTDIFF_CUDA_ARCHS
#include "../cuda/group_norm_silu.h"
#endif

namespace fastdiff {
namespace {

// statistics: the means of all groups, and behind them their rstd.
GroupNormForward group_norm_forward(const GroupNormShape& shape, uintptr_t x, uintptr_t weight,
                                    uintptr_t bias, uintptr_t scale, uintptr_t shift, uintptr_t add,
                                    uintptr_t y, uintptr_t statistics) {
  float* mean = at<float>(statistics);
  float* rstd = mean == nullptr ? nullptr : mean + shape.samples * shape.groups;
  return {at(x), at(weight), at(bias), at(scale), at(shift), at(add), at(y), mean, rstd};
}

GroupNormBackward group_norm_backward(const GroupNormShape& shape, uintptr_t dy, uintptr_t x,
                                      uintptr_t weight, uintptr_t bias, uintptr_t scale,
                                      uintptr_t shift, uintptr_t add, uintptr_t statistics,
                                      uintptr_t dx, uintptr_t dweight, uintptr_t dbias,
                                      uintptr_t dscale, uintptr_t dshift, uintptr_t dadd) {
  const float* mean = at<float>(statistics);
  const float* rstd = mean + shape.samples * shape.groups;
  return {at(dy), at(x),  at(weight),  at(bias),  at(scale),  at(shift),  at(add), mean,
          rstd,   at(dx), at(dweight), at(dbias), at(dscale), at(dshift), at(dadd)};
}

const Binding group_norm_shape_binding([](py::module_& module) {
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
});

// How CUDA would cut a call into blocks, with or without CUDA.
const Binding group_norm_tile_binding([](py::module_& module) {
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
});

const Binding group_norm_silu_binding([](py::module_& module) {
  module.def("group_norm_silu_cpu",
             [](const GroupNormShape& shape, uintptr_t x, uintptr_t weight, uintptr_t bias,
                uintptr_t scale, uintptr_t shift, uintptr_t add, uintptr_t y, uintptr_t statistics,
                int threads) {
               py::gil_scoped_release unlocked;
               const GroupNormForward call =
                   group_norm_forward(shape, x, weight, bias, scale, shift, add, y, statistics);
               run_with_workspace(cpu::group_norm_silu, shape, call, threads);
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
               run_with_workspace(cpu::group_norm_silu_backward, shape, call, threads);
             });
});

#ifdef FASTDIFF_CUDA_ARCHS
const Binding group_norm_silu_cuda_binding([](py::module_& module) {
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
});
#endif

}  // namespace
}  // namespace fastdiff

// What tests ask of the emulated GPU.
#include "../bindings/binding.h"
#include "../cuda/fast_normal.h"
#include "cuda_runtime.h"

namespace fastdiff {
namespace {

const Binding emulation_binding([](py::module_& module) {
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
  // The normals, the CPU's and the GPU's, of words of the caller's choice.
  module.def("box_muller", [](uint32_t word0, uint32_t word1) {
    float n0, n1;
    box_muller<float>(word0, word1, &n0, &n1);
    return py::make_tuple(n0, n1);
  });
  module.def("fast_box_muller", [](uint32_t word0, uint32_t word1) {
    float n0, n1;
    cuda::fast_box_muller(word0, word1, &n0, &n1);
    return py::make_tuple(n0, n1);
  });
});

}  // namespace
}  // namespace fastdiff

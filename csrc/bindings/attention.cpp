#include <pybind11/stl.h>

#include <array>

#include "../cpu/attention.h"
#include "binding.h"

namespace fastdiff {
namespace {

using Strides = std::array<int64_t, 3>;  // of (samples, channels, tokens)

TokenTensor token_tensor(uintptr_t data, const Strides& strides) {
  return {at(data), strides[0], strides[1], strides[2]};
}

Attention attention_of(int dtype, int products, int64_t samples, int64_t heads, int64_t tokens,
                       int64_t head_dim, int64_t head_rows, int64_t part_rows, uintptr_t qkv,
                       const Strides& qkv_strides, uintptr_t out, const Strides& out_strides,
                       uintptr_t lse) {
  Attention attention = {};
  attention.dtype = static_cast<DType>(dtype);
  attention.products = static_cast<Products>(products);
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

const Binding attention_binding([](py::module_& module) {
  py::class_<Attention>(module, "Attention").def(py::init(&attention_of));
  module.def("attention_workspace", [](const Attention& attention, bool for_backward, int threads) {
    return cpu::attention_workspace(attention, for_backward, threads);
  });
  module.def("attention_forward_cpu", [](Attention attention, uintptr_t workspace, int threads) {
    py::gil_scoped_release unlocked;
    attention.workspace = at<float>(workspace);
    cpu::attention_forward(attention, threads);
  });
  module.def(
      "attention_backward_cpu",
      [](Attention attention, uintptr_t grad_out, const Strides& grad_out_strides,
         uintptr_t grad_qkv, const Strides& grad_qkv_strides, uintptr_t workspace, int threads) {
        py::gil_scoped_release unlocked;
        attention.grad_out = token_tensor(grad_out, grad_out_strides);
        attention.grad_qkv = token_tensor(grad_qkv, grad_qkv_strides);
        attention.workspace = at<float>(workspace);
        cpu::attention_backward(attention, threads);
      });
});

}  // namespace
}  // namespace fastdiff

// The part of the Python module that launches CUDA kernels.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdiff {

void bind_cuda(pybind11::module_& module);

}  // namespace fastdiff

// The operands of elementwise kernels as Python passes them.
#pragma once

#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

#include "../common/elementwise.h"

namespace fastdiff {

// dtype, and the strides of sample, channel and position
using LayoutTuple = std::tuple<int, int64_t, int64_t, int64_t>;
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t>;

inline Layout layout_of(const LayoutTuple& t) {
  return {static_cast<DType>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

inline Shape shape_of(const ShapeTuple& t) {
  return {std::get<0>(t), std::get<1>(t), std::get<2>(t)};
}

}  // namespace fastdiff

// What the bindings of the CPU's kernels and of CUDA's make alike of the integers that Python
// passes. An address is 0 where an argument is not given.
#pragma once

#include <cstdint>

#include "common/group_norm.h"

namespace fastdiff {

template <typename T = void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// statistics: the means of all groups, and behind them their rstd.
inline GroupNormForward group_norm_forward(const GroupNormShape& shape, uintptr_t x,
                                           uintptr_t weight, uintptr_t bias, uintptr_t scale,
                                           uintptr_t shift, uintptr_t add, uintptr_t y,
                                           uintptr_t statistics) {
  float* mean = at<float>(statistics);
  float* rstd = mean == nullptr ? nullptr : mean + shape.samples * shape.groups;
  return {at(x), at(weight), at(bias), at(scale), at(shift), at(add), at(y), mean, rstd};
}

inline GroupNormBackward group_norm_backward(const GroupNormShape& shape, uintptr_t dy, uintptr_t x,
                                             uintptr_t weight, uintptr_t bias, uintptr_t scale,
                                             uintptr_t shift, uintptr_t add, uintptr_t statistics,
                                             uintptr_t dx, uintptr_t dweight, uintptr_t dbias,
                                             uintptr_t dscale, uintptr_t dshift, uintptr_t dadd) {
  const float* mean = at<float>(statistics);
  const float* rstd = mean + shape.samples * shape.groups;
  return {at(dy), at(x),  at(weight),  at(bias),  at(scale),  at(shift),  at(add), mean,
          rstd,   at(dx), at(dweight), at(dbias), at(dscale), at(dshift), at(dadd)};
}

}  // namespace fastdiff

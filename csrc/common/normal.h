// What a normal fill is asked to do, on any device.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastdiff {

// Sample i of `out` is a (channels, spatial) array whose element (c, s) has index
// c·spatial + s in the counter and stands at i·sample_stride + c·channel_stride +
// s·spatial_stride, in elements. A contiguous sample is one channel.
struct NormalFill {
  void* out;
  DType dtype;
  int64_t samples;
  int64_t channels;
  int64_t spatial;
  int64_t sample_stride;
  int64_t channel_stride;
  int64_t spatial_stride;
  uint64_t seed;
  uint32_t step;
  uint64_t first_sample;
};

}  // namespace fastdiff

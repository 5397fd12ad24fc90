// What a rms_norm_silu call is asked to do.
//
//   v = x / max(‖x‖, eps) · √channels · weight · (1 + scale) + shift   ‖x‖ = √Σx² over the channels
//   y = v · sigmoid(v), or v without the activation                        of one position
//
// x and y are dense (samples, channels, positions) or, with channels_last, (samples, positions,
// channels). weight is (channels,); scale and shift are (samples, channels), their rows a stride
// apart.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastdiff {

struct RmsNormShape {
  int64_t samples;
  int64_t channels;
  int64_t positions;
  bool channels_last;
  bool silu;
  float eps;
  DType dtype;  // of x and y
  DType weight_dtype;
  DType film_dtype;  // of scale and shift
  int64_t scale_stride;
  int64_t shift_stride;
};

// scale and shift may be null, both of them.
struct RmsNormCall {
  const void* x;
  const void* weight;
  const void* scale;
  const void* shift;
  void* y;
};

}  // namespace fastdiff

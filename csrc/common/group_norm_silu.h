// What a group_norm_silu call is asked to do, on any device.
//
//   x̂ = (x + add − mean_g) · rstd_g        statistics of x + add over a group: (channels / groups) ·
//   v = (x̂ · weight + bias) · (1 + scale) + shift                      positions of one sample
//   y = v · sigmoid(v), or v without the activation
//
// x, y, dy, dx and a residual are dense (samples, channels, positions) or, with channels_last,
// (samples, positions, channels). weight and bias are (channels,); scale, shift and an embedding
// are (samples, channels), their rows a stride apart.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastdiff {

enum class Add : int { kNothing = 0, kEmbedding = 1, kResidual = 2 };

struct GroupNormShape {
  int64_t samples;
  int64_t channels;
  int64_t positions;
  int64_t groups;
  bool channels_last;
  bool silu;
  float eps;
  Add add;
  DType dtype;         // of x, y, dy, dx and a residual
  DType affine_dtype;  // of weight and bias
  DType film_dtype;    // of scale and shift
  DType add_dtype;     // of an embedding
  int64_t scale_stride;
  int64_t shift_stride;
  int64_t add_stride;
};

// weight and bias, scale and shift, and add may be null; statistics may be null where y alone is
// wanted. mean and rstd are (samples, groups).
struct GroupNormForward {
  const void* x;
  const void* weight;
  const void* bias;
  const void* scale;
  const void* shift;
  const void* add;
  void* y;
  float* mean;
  float* rstd;
};

// With dv = dy · ∂y/∂v, the gradients besides dx are, over the positions,
//   dweight = Σ_samples (1 + scale) · Σ dv·x̂      dscale = weight · Σ dv·x̂ + bias · Σ dv
//   dbias   = Σ_samples (1 + scale) · Σ dv        dshift = Σ dv        dadd = Σ dx
// dweight and dbias are (channels,) of affine_dtype, dscale and dshift dense (samples, channels) of
// film_dtype, dadd that of add_dtype; each may be null.
struct GroupNormBackward {
  const void* dy;
  const void* x;
  const void* weight;
  const void* bias;
  const void* scale;
  const void* shift;
  const void* add;
  const float* mean;
  const float* rstd;
  void* dx;
  void* dweight;
  void* dbias;
  void* dscale;
  void* dshift;
  void* dadd;
};

}  // namespace fastdiff

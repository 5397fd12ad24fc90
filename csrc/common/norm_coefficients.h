// A group norm as a scale and a shift per sample and channel.
//
//   gain = weight / sqrt(variance + eps)·(1 + scale)      mean and variance of the channel's group
//   offset = (bias − mean·weight / sqrt(variance + eps))·(1 + scale) + shift
//
// moments are (samples, 2, channels), the mean and the variance of each channel over as many places
// each; second's channels come after them. weight and bias are (channels of both,), scale and shift
// (samples, channels of both) with their rows a stride apart, coefficients (samples, 2, channels of
// both).
#pragma once

#include <cstdint>

namespace fastdiff {

struct NormCoefficientsShape {
  int64_t samples;
  int64_t channels;  // of moments
  int64_t second_channels;
  int64_t groups;
  float eps;
  int64_t film_stride;
};

// second may be null, and so may scale and shift, both of them.
struct NormCoefficientsCall {
  const float* moments;
  const float* second;
  const float* weight;
  const float* bias;
  const float* scale;
  const float* shift;
  float* coefficients;
};

}  // namespace fastdiff

// What a convolution call is asked to do.
//
//   h = silu(scale·[x, second] + shift)   scale and shift per sample and channel, or x itself
//   y = conv(h) + bias + add + residual   of h doubled by repetition, with `upsample`
//   moments: the mean and the variance of y per sample and channel
//
// x, second, residual and y are dense (samples, height, width, channels); coefficients are (samples,
// 2, channels), add is (samples, out_channels) with its rows a stride apart, moments (samples, 2,
// out_channels).
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastdiff {

// How products are made: of float32; in tiles of bfloat16, or of float32 in two bfloat16 pieces each
// without the product of the smaller ones; of float32 by Winograd's algorithm in tiles of 2×2 or 4×4
// outputs, for 3×3 kernels and stride 1 alone; or of bfloat16, two channels at a time.
enum class Products : int {
  kFloat32 = 0,
  kBFloat16 = 1,
  kSplit = 2,
  kWinograd2 = 3,
  kWinograd4 = 4,
  kPairs = 5
};

struct ConvolutionShape {
  int64_t samples;
  int64_t channels;  // of x
  int64_t second_channels;
  int64_t height;  // of x
  int64_t width;
  int64_t out_channels;
  int64_t out_height;
  int64_t out_width;
  int64_t kernel_height;
  int64_t kernel_width;
  int64_t stride;
  int64_t padding;  // zeros before the first row and column; those after follow from the sizes
  bool upsample;
  bool folded;  // upsample, by panels of sums of taps: one after the other for a doubled place's four
  bool silu;
  DType dtype;  // of x, second, residual and y
  Products products;
  int64_t add_stride;
};

// (out_channels, channels, taps), whose elements are strides apart.
struct ConvolutionWeight {
  const float* values;
  int64_t out_channels;
  int64_t channels;
  int64_t taps;
  int64_t out_stride;
  int64_t channel_stride;
  int64_t tap_stride;
};

// second, coefficients, bias, add, residual and moments may be null. panels are what
// pack_convolution has made.
struct ConvolutionCall {
  const void* x;
  const void* second;
  const float* coefficients;
  const void* panels;
  const float* bias;
  const float* add;
  const void* residual;
  void* y;
  float* moments;
};

// dy is the gradient of y, (samples, out_height, out_width, out_channels) in x's dtype; dw has
// elements (out_channels, channels, taps) that are strides apart. db may be null.
struct ConvolutionWeightGradientCall {
  const void* x;
  const void* dy;
  float* dw;
  float* db;
  int64_t out_stride;
  int64_t channel_stride;
  int64_t tap_stride;
};

}  // namespace fastdiff

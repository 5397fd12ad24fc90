// SiLU and its derivative, for a number.
#pragma once

#include "lanes.h"

namespace fastdiff {

// 1 / (1 + e^-v); 0 and 1 far out, NaN for NaN.
FASTDIFF_INLINE float sigmoid(float v) {
  const float denominator = 1.0f + Lanes<float>::exp(-v);
#ifdef __CUDA_ARCH__
  return __fdividef(1.0f, denominator);  // two ulps, a quarter of the instructions of a division
#else
  return 1.0f / denominator;
#endif
}

FASTDIFF_INLINE float silu(float v) { return v * sigmoid(v); }

FASTDIFF_INLINE float silu_derivative(float v) {
  const float s = sigmoid(v);
  return s * (1.0f + v * (1.0f - s));
}

}  // namespace fastdiff

// SiLU and its derivative, for a number.
#pragma once

#include "lanes.h"

namespace fastdiff {

// One ulp, an eighth of the instructions of a division; 0 where that is below 2^-126.
FASTDIFF_INLINE float reciprocal(float a) {
#ifdef __CUDA_ARCH__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
#else
  return 1.0f / a;
#endif
}

// 1 / (1 + e^-v); 0 and 1 far out, NaN for NaN.
FASTDIFF_INLINE float sigmoid(float v) { return reciprocal(1.0f + Lanes<float>::exp(-v)); }

// The same from the GPU's own exponential: relative error 2^-22 + |v|·2^-24.
FASTDIFF_INLINE float fast_sigmoid(float v) {
#ifdef __CUDA_ARCH__
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v * -1.44269504f));  // log2(e)
  return reciprocal(1.0f + power);
#else
  return sigmoid(v);
#endif
}

// s: the sigmoid of v
FASTDIFF_INLINE float silu_derivative(float v, float s) { return s * (1.0f + v * (1.0f - s)); }

}  // namespace fastdiff

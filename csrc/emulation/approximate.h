// Stand-ins for cuda/approximate.h: as far from the exact values as NVIDIA's bounds allow, above or
// below as the argument's bits have it, so that tests meet the largest errors and not the typical ones.
#pragma once

#include <cmath>

#include "../common/lanes.h"
#include "cuda_runtime.h"

namespace fastdiff::cuda {

inline float erring(float x, double exact, double error) {
  const bool above = (Lanes<float>::bits_of(x) * 0x9E3779B9u) >> 31 != 0u;
  return static_cast<float>(above ? exact + error : exact - error);
}

inline float approximate_log2(float x) {
  const double exact = std::log2(static_cast<double>(x));
  return erring(x, exact, x >= 0.5f ? 0x1p-22 : 0x1p-22 * std::exp2(std::floor(std::log2(-exact))));
}

inline float approximate_sqrt(float x) {
  const double exact = std::sqrt(static_cast<double>(x));
  return erring(x, exact, exact * 0x1p-23);
}

constexpr double kTurnError = 6.74e-7;  // 2^-20.5

inline float approximate_cos(float x) { return erring(x, std::cos(double{x}), kTurnError); }

inline float approximate_sin(float x) { return erring(x, std::sin(double{x}), kTurnError); }

}  // namespace fastdiff::cuda

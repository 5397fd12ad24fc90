#pragma once

#include <cmath>
#include <cstdint>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

// nearbyint rounds to even, in units of the last place.
inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return {static_cast<uint16_t>(sign | 0x7E00)};
  const double magnitude = std::fabs(value);
  if (magnitude >= 65520.0) return {static_cast<uint16_t>(sign | 0x7C00)};
  const int exponent = magnitude < 0x1p-14 ? -14 : std::ilogb(magnitude);
  const auto steps = static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  // A normal number has 1024 to 2048 steps, and 2048 carries into the exponent by itself.
  return {static_cast<uint16_t>(sign | (steps + (exponent + 14) * 1024))};
}

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31;
  const int mantissa = value.bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = mantissa ? NAN : INFINITY;
  } else {
    magnitude = std::ldexp(static_cast<float>(exponent ? mantissa + 1024 : mantissa),
                           (exponent ? exponent : 1) - 25);
  }
  return value.bits & 0x8000 ? -magnitude : magnitude;
}

struct __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}

inline float2 __half22float2(__half2 two) { return {__half2float(two.x), __half2float(two.y)}; }

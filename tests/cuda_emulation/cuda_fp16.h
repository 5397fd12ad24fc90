#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

// Finite values below float16's overflow. nearbyint rounds to even, in units of the last place.
inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  int exponent = magnitude < 0x1p-14 ? -14 : std::ilogb(magnitude);
  const auto steps = static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  // A normal number has 1024 to 2048 steps, and 2048 carries into the exponent by itself.
  return {static_cast<uint16_t>(sign | (steps + (exponent + 14) * 1024))};
}

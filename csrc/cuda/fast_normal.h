// The normals of the fused kernels: common/philox.h's integers and uniforms, and Box–Muller by the
// GPU's approximate functions, a quarter of the exact form's instructions.
//
//   z = √(−2 ln u0) · (cos x, sin x)    x = 2πu1 in [−π, π), of the word as a signed number
//
// |z − z of the CPU| <= 1.2e-5 for every pair of words, a twentieth of it in most. The sum of what
// NVIDIA's bounds of the functions allow (PTX ISA: lg2, sqrt, sin and cos.approx) and of the
// roundings here and there, largest where the radius is, 6.8:
//
//   sin, cos     2^-20.5, absolute                    times the radius        4.6e-6
//   x            three roundings, one of the CPU's u  times the radius        3.3e-6
//   the radius   log2's 2 ulp, √'s 2^-23, a product's rounding                1.8e-6
//                log2's 2^-22 for u in [½, 1], at u = 1 − 2^-7                1.3e-6
//   z            the CPU's 4 ulp and a rounding                               2.1e-6
//
// Near u = 1, where ln u is less than its absolute error, it is v·(2 + v) with v = 1 − u.
// kernels/philox.py has the same operations in the same order.
#pragma once

#include "../common/philox.h"
#ifdef FASTDIFF_EMULATION
#include "../emulation/approximate.h"
#else
#include "approximate.h"
#endif

namespace fastdiff::cuda {

__device__ __forceinline__ void fast_box_muller(uint32_t word0, uint32_t word1, float* n0,
                                                float* n1) {
  using L = Lanes<float>;
  const float u = uniform_of<float>(word0);
  const float v = L::add(1.0f, -u);
  const float near_one = L::mul(v, L::add(v, 2.0f));  // −2 ln u up to ⅓v² of it
  const float elsewhere = L::mul(approximate_log2(u), -1.38629436f);
  const float radius = approximate_sqrt(v < 0x1p-7f ? near_one : elsewhere);
  const float turns = L::round_int(static_cast<int32_t>(word1));  // times 2^32
  const float x = L::fma(turns, 6.28318531f * 0x1p-32f, 6.28318531f * 0x1p-33f);
  *n0 = L::mul(radius, approximate_cos(x));
  *n1 = L::mul(radius, approximate_sin(x));
}

// Elements 4·quad … 4·quad + 3 of one sample.
__device__ __forceinline__ Normals4 fast_normals_of(Words4 words) {
  Normals4 out;
  fast_box_muller(words.w[0], words.w[1], &out.n[0], &out.n[1]);
  fast_box_muller(words.w[2], words.w[3], &out.n[2], &out.n[3]);
  return out;
}

}  // namespace fastdiff::cuda

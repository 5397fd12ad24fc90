// Vectors of float32 for the CPU kernels: one register of the instruction set being compiled.
//
// Vec is a GCC vector extension type: + - * / and comparisons work lane by lane. Storage types are
// read and written through load and store, which convert: float32, bfloat16 and float16 round to
// nearest even, NaN stays NaN, and float16 overflows to infinity. The _n forms touch only the first
// n elements. Everything is static, as csrc/common/philox.h explains.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../common/dtype.h"

#define FASTDIFF_VEC static inline __attribute__((always_inline))

namespace fastdiff::cpu::FASTDIFF_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t VecI __attribute__((vector_size(4 * kWidth)));
typedef uint32_t VecU __attribute__((vector_size(4 * kWidth)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * kWidth)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FASTDIFF_VEC Vec splat(float value) { return value - Vec{}; }  // 0 + value would lose -0
FASTDIFF_VEC VecU as_bits(Vec v) { return reinterpret_cast<VecU>(v); }
FASTDIFF_VEC Vec as_floats(VecU v) { return reinterpret_cast<Vec>(v); }
FASTDIFF_VEC VecHalf narrow(VecU v) { return __builtin_convertvector(v, VecHalf); }
FASTDIFF_VEC VecU widen(VecHalf v) { return __builtin_convertvector(v, VecU); }

// a·b + c, in one rounding where the instruction set has one.
FASTDIFF_VEC Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<Vec>(_mm256_fmadd_ps(
      reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

FASTDIFF_VEC float sum(Vec v) {
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

FASTDIFF_VEC Vec to_floats(VecHalf v, BFloat16) { return as_floats(widen(v) << 16); }

FASTDIFF_VEC VecHalf from_floats(Vec v, BFloat16) {
  const VecU bits = as_bits(v);
  const VecU rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const VecU is_nan = reinterpret_cast<VecU>(v != v);
  return narrow((rounded & ~is_nan) | (0x7FC0u & is_nan));
}

FASTDIFF_VEC Vec to_floats(VecHalf v, Float16) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(v)));
#elif defined(__F16C__)
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(v)));
#else
  const VecU half = widen(v);
  // Exponent and mantissa at float32's places; 2^112 moves the bias, and makes subnormals normal.
  const VecU magnitude = as_bits(as_floats((half & 0x7FFFu) << 13) * splat(0x1p112f));
  const VecU special = reinterpret_cast<VecU>((half & 0x7C00u) == 0x7C00u);
  return as_floats(magnitude | (special & 0x7F800000u) | ((half & 0x8000u) << 16));
#endif
}

FASTDIFF_VEC VecHalf from_floats(Vec v, Float16) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecHalf>(_mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
#elif defined(__F16C__)
  return reinterpret_cast<VecHalf>(_mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
#else
  const VecU bits = as_bits(v);
  const VecU sign = (bits >> 16) & 0x8000u;
  const VecU magnitude = bits & 0x7FFFFFFFu;
  const VecU normal = (magnitude + 0x0FFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Below 2^-14 the result is subnormal: adding 1/2, whose ulp is float16's smallest step, rounds.
  const VecU subnormal = as_bits(as_floats(magnitude) + splat(0.5f)) - 0x3F000000u;
  const VecU small = reinterpret_cast<VecU>(magnitude < 0x38800000u);
  const VecU overflows = reinterpret_cast<VecU>(magnitude >= 0x477FF000u);
  const VecU is_nan = reinterpret_cast<VecU>(v != v);
  VecU half = (small & subnormal) | (~small & normal);
  half = (overflows & 0x7C00u) | (~overflows & half);
  half = (is_nan & 0x7E00u) | (~is_nan & half);
  return narrow(sign | half);
#endif
}

FASTDIFF_VEC Vec load(const float* from) {
  Vec v;
  memcpy(&v, from, sizeof v);
  return v;
}

FASTDIFF_VEC void store(float* to, Vec v) { memcpy(to, &v, sizeof v); }

template <typename T>
FASTDIFF_VEC Vec load(const T* from) {
  VecHalf v;
  memcpy(&v, from, sizeof v);
  return to_floats(v, T{});
}

template <typename T>
FASTDIFF_VEC void store(T* to, Vec v) {
  const VecHalf half = from_floats(v, T{});
  memcpy(to, &half, sizeof half);
}

// The first n elements; the other lanes are zero.
template <typename T>
FASTDIFF_VEC Vec load_n(const T* from, int n) {
  T elements[kWidth];
  memset(elements, 0, sizeof elements);
  for (int i = 0; i < n; ++i) elements[i] = from[i];
  return load(elements);
}

template <typename T>
FASTDIFF_VEC void store_n(T* to, Vec v, int n) {
  T elements[kWidth];
  store(elements, v);
  for (int i = 0; i < n; ++i) to[i] = elements[i];
}

FASTDIFF_VEC float to_float(float value) { return value; }

template <typename T>
FASTDIFF_VEC float to_float(T value) {
  return to_floats(VecHalf{} + value.bits, T{})[0];
}

// e^x to about 1 ulp; finite for every x, 0 < result: x is taken as if within [-87, 88].
FASTDIFF_VEC Vec exp(Vec x) {
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  x = x > splat(88.0f) ? splat(88.0f) : x;
  const Vec shifted = fma(x, splat(1.44269504f), splat(12582912.0f));  // rounds to an integer
  const Vec n = shifted - splat(12582912.0f);
  Vec r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);  // |r| <= ln 2 / 2
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  return as_floats(as_bits(p) + (as_bits(shifted) << 23));
}

// 1 / (1 + e^-x)
FASTDIFF_VEC Vec sigmoid(Vec x) {
  const Vec d = splat(1.0f) + exp(-x);
#if defined(__AVX512F__)  // a division takes as long as the rest: 14 bits and one Newton step
  const Vec r = reinterpret_cast<Vec>(_mm512_rcp14_ps(reinterpret_cast<__m512>(d)));
  return r * fma(-d, r, splat(2.0f));
#else
  return splat(1.0f) / d;
#endif
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

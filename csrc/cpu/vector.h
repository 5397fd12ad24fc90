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
#define FASTDIFF_MEMBER inline __attribute__((always_inline))
// Work per row or sample that no template's arguments change: compiled once, not with each of them.
#define FASTDIFF_ONCE inline __attribute__((noinline))

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
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#elif defined(__AVX2__)
  const __m256 all = reinterpret_cast<__m256>(v);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

FASTDIFF_VEC Vec to_floats(VecHalf v, BFloat16) { return as_floats(widen(v) << 16); }

FASTDIFF_VEC VecHalf from_floats(Vec v, BFloat16) {
#if defined(__AVX512BF16__)  // takes subnormals for zero
  return reinterpret_cast<VecHalf>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#else
  const VecU bits = as_bits(v);
  const VecU rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const VecU is_nan = reinterpret_cast<VecU>(v != v);
  return narrow((rounded & ~is_nan) | (0x7FC0u & is_nan));
#endif
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

// AddressSanitizer does not look into masked instructions: its build reads one by one.
#if defined(__AVX512F__) && !defined(__SANITIZE_ADDRESS__)
#define FASTDIFF_MASKED
#endif

// The first n elements, 0 <= n <= kWidth; the other lanes are zero.
template <typename T>
FASTDIFF_VEC Vec load_n(const T* from, int n) {
#if defined(FASTDIFF_MASKED)
  const __mmask16 lanes = static_cast<__mmask16>((1u << n) - 1u);
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(lanes, from));
  } else {
    return to_floats(reinterpret_cast<VecHalf>(_mm256_maskz_loadu_epi16(lanes, from)), T{});
  }
#else
  T elements[kWidth];
  memset(elements, 0, sizeof elements);
  for (int i = 0; i < n; ++i) elements[i] = from[i];
  return load(elements);
#endif
}

template <typename T>
FASTDIFF_VEC void store_n(T* to, Vec v, int n) {
#if defined(FASTDIFF_MASKED)
  const __mmask16 lanes = static_cast<__mmask16>((1u << n) - 1u);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(to, lanes, reinterpret_cast<__m512>(v));
  } else {
    _mm256_mask_storeu_epi16(to, lanes, reinterpret_cast<__m256i>(from_floats(v, T{})));
  }
#else
  T elements[kWidth];
  store(elements, v);
  for (int i = 0; i < n; ++i) to[i] = elements[i];
#endif
}

// One in the first n lanes, zero in the others.
FASTDIFF_VEC Vec ones_n(int n) {
  Vec v{};
  for (int i = 0; i < kWidth; ++i) v[i] = i < n ? 1.0f : 0.0f;
  return v;
}

FASTDIFF_VEC float to_float(float value) { return value; }

template <typename T>
FASTDIFF_VEC float to_float(T value) {
  return to_floats(VecHalf{} + value.bits, T{})[0];
}

// e^x to about 1 ulp, NaN for NaN; else 0 < result < infinity: x is taken as if within [-87, 88].
FASTDIFF_VEC Vec exp(Vec x) {
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  x = x > splat(88.0f) ? splat(88.0f) : x;
  // Rounds to an integer, which stands in the low bits with the exponent's bias.
  const Vec shifted = fma(x, splat(1.44269504f), splat(12582912.0f + 127.0f));
  const Vec n = shifted - splat(12582912.0f + 127.0f);
  Vec r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);  // |r| <= ln 2 / 2
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  return p * as_floats(as_bits(shifted) << 23);  // a product, since NaN's bits are any
}

// 2^t for the sigmoid: no clamp, so that it overflows to infinity and underflows to zero. The
// relative error is 8e-8, or 3e-6 where kExact is false.
template <bool kExact>
FASTDIFF_VEC Vec exp2_free(Vec t) {
#if defined(__AVX512F__)
  const __m512 fraction = _mm512_reduce_ps(reinterpret_cast<__m512>(t), 0x08);  // t - round(t)
  const __m512 integer = _mm512_sub_ps(reinterpret_cast<__m512>(t), fraction);
  const Vec r = reinterpret_cast<Vec>(fraction);
#else
  t = t < splat(-126.0f) ? splat(-126.0f) : t;
  t = t > splat(127.0f) ? splat(127.0f) : t;
  const Vec shifted = t + splat(12582912.0f);  // rounds to an integer
  const Vec r = t - (shifted - splat(12582912.0f));
#endif
  Vec p;
  if (kExact) {
    p = fma(splat(0.00132764713f), r, splat(0.00967554096f));
    p = fma(p, r, splat(0.0555071309f));
    p = fma(p, r, splat(0.240221202f));
    p = fma(p, r, splat(0.693146944f));
    p = fma(p, r, splat(1.00000012f));
  } else {
    p = fma(splat(0.00957010128f), r, splat(0.0559178591f));
    p = fma(p, r, splat(0.240247443f));
    p = fma(p, r, splat(0.693121791f));
    p = fma(p, r, splat(0.999999285f));
  }
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), integer));
#else
  return as_floats(as_bits(p) + (as_bits(shifted) << 23));
#endif
}

// 1 / (1 + e^-x), exact enough for results that are stored as T.
template <typename T>
FASTDIFF_VEC Vec sigmoid(Vec x) {
  const Vec d = splat(1.0f) + exp2_free<sizeof(T) == 4>(x * splat(-1.44269504f));
#if defined(__AVX512F__)
  if (sizeof(T) == 2) return reinterpret_cast<Vec>(_mm512_rcp14_ps(reinterpret_cast<__m512>(d)));
#endif
  return splat(1.0f) / d;
}

// SiLU of v, or v itself, to be stored as T.
template <typename T, bool kSilu>
FASTDIFF_VEC Vec activate(Vec v) {
  return kSilu ? v * sigmoid<T>(v) : v;
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

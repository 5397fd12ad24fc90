// Counter-based Gaussian noise, the arithmetic that CPU and CUDA share.
//
//   counter = (element / 4, step, sample low, sample high), key = (seed low, seed high)
//   (r0, r1, r2, r3) = Philox4x32-10(counter, key)      Salmon et al., SC'11, "Parallel random
//                                                       numbers: as easy as 1, 2, 3"
//   u = r·2^-32 + 2^-33                                  rounded to float32, in (0, 1]
//   (n0, n1) = sqrt(-2·ln u0) · (cos 2πu1, sin 2πu1)     Box–Muller; (n2, n3) from (u2, u3)
//
// Every float operation is one IEEE rounding and none is fused, so that the baseline CPU, AVX-512
// and the GPU give the same bits; kernels/philox.py repeats the operations in the same order.
//
// Everything here is static: this header is compiled once per instruction set, and a function with
// external linkage would be merged across them, leaving AVX-512 code in the baseline's hands.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTDIFF_INLINE static __host__ __device__ __forceinline__
#else
#define FASTDIFF_INLINE static inline __attribute__((always_inline))
#endif

namespace fastdiff {

struct Words4 {
  uint32_t w[4];
};

struct Normals4 {
  float n[4];
};

// One rounding each. nvcc would contract a plain a * b + c; the CPU sources are compiled with
// -ffp-contract=off.
FASTDIFF_INLINE float mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

FASTDIFF_INLINE float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

FASTDIFF_INLINE float square_root(float a) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

FASTDIFF_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTDIFF_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FASTDIFF_INLINE Words4 philox4x32_10(Words4 counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.w[0], c1 = counter.w[1], c2 = counter.w[2], c3 = counter.w[3];
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

FASTDIFF_INLINE Words4 philox_words(uint64_t seed, uint32_t step, uint64_t sample, uint32_t quad) {
  const Words4 counter = {{quad, step, static_cast<uint32_t>(sample),
                           static_cast<uint32_t>(sample >> 32)}};
  return philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

FASTDIFF_INLINE float uniform_of(uint32_t word) {
  return add(mul(static_cast<float>(word), 0x1p-32f), 0x1p-33f);
}

// ln u for u in [2^-33, 1]: u = m·2^e with m in [√½, √2), ln m = f - f²/2 + f³·P(f), f = m - 1.
// P is a weighted least-squares fit whose relative error in ln is 7e-9.
FASTDIFF_INLINE float natural_log(float u) {
  const int32_t offset = static_cast<int32_t>(bits_of(u)) - 0x3F3504F3;  // bits of √½
  const int32_t exponent = offset >> 23;
  const float f = add(float_of(static_cast<uint32_t>((offset & 0x007FFFFF) + 0x3F3504F3)), -1.0f);
  const float e = static_cast<float>(exponent);

  float p = -0.0735380277f;
  p = add(mul(p, f), 0.126151875f);
  p = add(mul(p, f), -0.132034585f);
  p = add(mul(p, f), 0.142280996f);
  p = add(mul(p, f), -0.166213155f);
  p = add(mul(p, f), 0.199997663f);
  p = add(mul(p, f), -0.250008523f);
  p = add(mul(p, f), 0.333333552f);

  const float f2 = mul(f, f);
  float low = mul(mul(f, f2), p);
  low = add(low, mul(e, -2.12194440e-4f));  // ln 2 = 0.693359375 - 2.12194440e-4: e·high is exact
  low = add(low, mul(-0.5f, f2));
  return add(add(low, f), mul(e, 0.693359375f));
}

// (cos 2πu, sin 2πu): the argument is reduced in turns, which is exact; 4u = quadrant + f with
// |f| <= ½, then odd and even minimax polynomials of πf/2 (relative errors 2.8e-8 and 4e-10).
FASTDIFF_INLINE void cos_sin_turns(float u, float* cosine, float* sine) {
  const float turns4 = mul(u, 4.0f);
  const int32_t quadrant = static_cast<int32_t>(add(turns4, 0.5f));
  const float f = add(turns4, -static_cast<float>(quadrant));
  const float s = mul(f, f);

  float p = -0.00468584523f;
  p = add(mul(p, s), 0.0797125027f);
  p = add(mul(p, s), -0.645966649f);
  p = add(mul(p, s), 1.57079637f);
  const uint32_t sin_f = bits_of(mul(p, f));

  float q = 0.00089448638f;
  q = add(mul(q, s), -0.0208555963f);
  q = add(mul(q, s), 0.253668547f);
  q = add(mul(q, s), -1.23370051f);
  const uint32_t cos_f = bits_of(add(mul(q, s), 1.0f));

  // Quadrants 1 and 3 swap the two; cos is negative in 1 and 2, sin in 2 and 3.
  const uint32_t n = static_cast<uint32_t>(quadrant);
  const uint32_t swap = 0u - (n & 1u);
  const uint32_t cos_sign = ((n + 1u) & 2u) << 30;
  const uint32_t sin_sign = (n & 2u) << 30;
  *cosine = float_of(((cos_f & ~swap) | (sin_f & swap)) ^ cos_sign);
  *sine = float_of(((sin_f & ~swap) | (cos_f & swap)) ^ sin_sign);
}

FASTDIFF_INLINE void box_muller(uint32_t word0, uint32_t word1, float* n0, float* n1) {
  const float radius = square_root(mul(-2.0f, natural_log(uniform_of(word0))));
  float cosine, sine;
  cos_sin_turns(uniform_of(word1), &cosine, &sine);
  *n0 = mul(radius, cosine);
  *n1 = mul(radius, sine);
}

// Elements 4·quad … 4·quad + 3 of one sample.
FASTDIFF_INLINE Normals4 normals_of(Words4 words) {
  Normals4 out;
  box_muller(words.w[0], words.w[1], &out.n[0], &out.n[1]);
  box_muller(words.w[2], words.w[3], &out.n[2], &out.n[3]);
  return out;
}

}  // namespace fastdiff

// The few operations that csrc/common's arithmetic is written in, so that one source serves a float
// (CUDA, and the CPU's known-answer tests) and a register of them (csrc/cpu/lanes.h).
//
// Everything here is static: these headers are compiled once per instruction set, and a function
// with external linkage would be merged across them, leaving AVX-512 code in the baseline's hands.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTDIFF_INLINE static __host__ __device__ __forceinline__
#else
#define FASTDIFF_INLINE static inline __attribute__((always_inline))
#endif

namespace fastdiff {

// F is float or a vector of floats; Word and Int are its lanes' bits, unsigned and signed.
template <typename F>
struct Lanes;

template <>
struct Lanes<float> {
  using Word = uint32_t;
  using Int = int32_t;

  FASTDIFF_INLINE float splat(float value) { return value; }

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

  // a·b + c in one rounding or two, whichever is faster.
  FASTDIFF_INLINE float fma(float a, float b, float c) {
#ifdef __CUDA_ARCH__
    return __fmaf_rn(a, b, c);
#else
    return a * b + c;
#endif
  }

  FASTDIFF_INLINE float square_root(float a) {
#ifdef __CUDA_ARCH__
    return __fsqrt_rn(a);
#else
    return __builtin_sqrtf(a);
#endif
  }

  FASTDIFF_INLINE float exp(float a) {
#ifdef __CUDA_ARCH__
    return expf(a);
#else
    return __builtin_expf(a);
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

  FASTDIFF_INLINE float round_word(uint32_t word) { return static_cast<float>(word); }
  FASTDIFF_INLINE float round_int(int32_t value) { return static_cast<float>(value); }
  FASTDIFF_INLINE int32_t truncate(float value) { return static_cast<int32_t>(value); }
  FASTDIFF_INLINE int32_t as_int(uint32_t bits) { return static_cast<int32_t>(bits); }
  FASTDIFF_INLINE uint32_t as_word(int32_t bits) { return static_cast<uint32_t>(bits); }
};

}  // namespace fastdiff

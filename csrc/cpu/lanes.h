// csrc/common/lanes.h's operations for one register of floats.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "../common/lanes.h"
#include "vector.h"

namespace fastdiff {

template <>
struct Lanes<cpu::FASTDIFF_ISA::Vec> {
  using Vec = cpu::FASTDIFF_ISA::Vec;
  using Word = cpu::FASTDIFF_ISA::VecU;
  using Int = cpu::FASTDIFF_ISA::VecI;

  FASTDIFF_INLINE Vec splat(float value) { return cpu::FASTDIFF_ISA::splat(value); }
  FASTDIFF_INLINE Vec mul(Vec a, Vec b) { return a * b; }
  FASTDIFF_INLINE Vec add(Vec a, Vec b) { return a + b; }
  FASTDIFF_INLINE Vec fma(Vec a, Vec b, Vec c) { return cpu::FASTDIFF_ISA::fma(a, b, c); }

  FASTDIFF_INLINE Vec square_root(Vec a) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vec>(_mm512_sqrt_ps(reinterpret_cast<__m512>(a)));
#elif defined(__AVX2__)
    return reinterpret_cast<Vec>(_mm256_sqrt_ps(reinterpret_cast<__m256>(a)));
#elif defined(__SSE2__)
    return reinterpret_cast<Vec>(_mm_sqrt_ps(reinterpret_cast<__m128>(a)));
#else
    for (int i = 0; i < cpu::FASTDIFF_ISA::kWidth; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
#endif
  }

  // Over all of float32, infinity and zero far out: what is beyond the range of vector.h's exp is
  // a second factor.
  FASTDIFF_INLINE Vec exp(Vec a) {
    Vec within = a < splat(-87.0f) ? splat(-87.0f) : a;
    within = within > splat(88.0f) ? splat(88.0f) : within;
    return cpu::FASTDIFF_ISA::exp(within) * cpu::FASTDIFF_ISA::exp(a - within);
  }

  FASTDIFF_INLINE Word bits_of(Vec value) { return reinterpret_cast<Word>(value); }
  FASTDIFF_INLINE Vec float_of(Word bits) { return reinterpret_cast<Vec>(bits); }
  FASTDIFF_INLINE Vec round_word(Word word) { return __builtin_convertvector(word, Vec); }
  FASTDIFF_INLINE Vec round_int(Int value) { return __builtin_convertvector(value, Vec); }
  FASTDIFF_INLINE Int truncate(Vec value) { return __builtin_convertvector(value, Int); }
  FASTDIFF_INLINE Int as_int(Word bits) { return reinterpret_cast<Int>(bits); }
  FASTDIFF_INLINE Word as_word(Int bits) { return reinterpret_cast<Word>(bits); }
};

}  // namespace fastdiff

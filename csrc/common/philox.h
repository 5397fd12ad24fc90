// Counter-based Gaussian noise, the arithmetic that CPU and CUDA share.
//
//   counter = (element / 4, step, sample low, sample high), key = (seed low, seed high)
//   (r0, r1, r2, r3) = Philox4x32-10(counter, key)      Salmon et al., SC'11, "Parallel random
//                                                       numbers: as easy as 1, 2, 3"
//   u = r·2^-32 + 2^-33                                  rounded to float32, in (0, 1]
//   (n0, n1) = sqrt(-2·ln u0) · (cos 2πu1, sin 2πu1)     Box–Muller; (n2, n3) from (u2, u3)
//
// Every float operation is one IEEE rounding and none is fused where that would show, so that the
// baseline CPU, AVX-512 and the GPU give the same bits; kernels/philox.py repeats the operations in
// the same order. csrc/cpu/draw.h has the generator for a register of counters.
#pragma once

#include "lanes.h"

namespace fastdiff {

struct Words4 {
  uint32_t w[4];
};

struct Normals4 {
  float n[4];
};

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxKeyStep1 = 0xBB67AE85u;

// nvcc would add the high words' product, which is zero, to that of the low ones.
FASTDIFF_INLINE uint64_t wide_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return static_cast<uint64_t>(__umulhi(a, b)) << 32 | a * b;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

FASTDIFF_INLINE Words4 philox4x32_10(Words4 counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.w[0], c1 = counter.w[1], c2 = counter.w[2], c3 = counter.w[3];
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = wide_product(kPhiloxMultiplier0, c0);
    const uint64_t product1 = wide_product(kPhiloxMultiplier1, c2);
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
  return {{c0, c1, c2, c3}};
}

FASTDIFF_INLINE Words4 philox_words(uint64_t seed, uint32_t step, uint64_t sample, uint32_t quad) {
  const Words4 counter = {
      {quad, step, static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32)}};
  return philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// Products by a power of two, and of few enough bits, are exact: fusing those with a sum changes no
// bit, and only those are fused.
template <typename F>
FASTDIFF_INLINE F uniform_of(typename Lanes<F>::Word word) {
  using L = Lanes<F>;
  return L::fma(L::round_word(word), L::splat(0x1p-32f), L::splat(0x1p-33f));
}

// p·x + c, rounded twice
template <typename F>
FASTDIFF_INLINE F horner(F p, F x, float c) {
  using L = Lanes<F>;
  return L::add(L::mul(p, x), L::splat(c));
}

// ln u for u in [2^-33, 1]: u = m·2^e with m in [√½, √2), ln m = f - f²/2 + f³·P(f), f = m - 1.
// P is a weighted least-squares fit whose relative error in ln is 7e-9.
template <typename F>
FASTDIFF_INLINE F natural_log(F u) {
  using L = Lanes<F>;
  const auto bits = L::bits_of(u);
  const auto exponent = (bits - 0x3F3504F3u) & 0xFF800000u;  // e·2^23; 0x3F3504F3: bits of √½
  const F e = L::round_int(L::as_int(exponent));             // 2^23 too large, as its factors know
  const F m = L::float_of(bits - exponent);
  const F f = L::add(m, L::splat(-1.0f));

  F p = L::splat(-0.0735380277f);
  p = horner(p, f, 0.126151875f);
  p = horner(p, f, -0.132034585f);
  p = horner(p, f, 0.142280996f);
  p = horner(p, f, -0.166213155f);
  p = horner(p, f, 0.199997663f);
  p = horner(p, f, -0.250008523f);
  p = horner(p, f, 0.333333552f);

  const F f2 = L::mul(f, f);
  F low = L::mul(L::mul(f, f2), p);
  low = L::add(low, L::mul(e, L::splat(-2.12194440e-4f * 0x1p-23f)));
  // ln 2 = 0.693359375 - 2.12194440e-4, of which the first has nine bits and e six: exact
  low = L::fma(f2, L::splat(-0.5f), low);
  return L::fma(e, L::splat(0.693359375f * 0x1p-23f), L::add(low, f));
}

// (cos 2πu, sin 2πu), u that of uniform_of(word): the argument is reduced in turns, which is exact;
// 4u = quadrant + f with |f| <= ½, then odd and even minimax polynomials of πf/2 (relative errors
// 2.8e-8 and 4e-10).
template <typename F>
FASTDIFF_INLINE void cos_sin_turns(typename Lanes<F>::Word word, F* cosine, F* sine) {
  using L = Lanes<F>;
  const F turns4 = L::fma(L::round_word(word), L::splat(0x1p-30f), L::splat(0x1p-31f));
  const auto quadrant = L::truncate(L::add(turns4, L::splat(0.5f)));
  const F f = L::add(turns4, -L::round_int(quadrant));
  const F s = L::mul(f, f);

  F p = L::splat(-0.00468584523f);
  p = horner(p, s, 0.0797125027f);
  p = horner(p, s, -0.645966649f);
  p = horner(p, s, 1.57079637f);
  const auto sin_f = L::bits_of(L::mul(p, f));

  F q = L::splat(0.00089448638f);
  q = horner(q, s, -0.0208555963f);
  q = horner(q, s, 0.253668547f);
  q = horner(q, s, -1.23370051f);
  const auto cos_f = L::bits_of(horner(q, s, 1.0f));

  // Quadrants 1 and 3 swap the two; cos is negative in 1 and 2, sin in 2 and 3.
  const auto n = L::as_word(quadrant);
  const auto odd = (n & 1u) != 0u;
  const auto sign = n << 30;
  *cosine = L::float_of((odd ? sin_f : cos_f) ^ ((sign + 0x40000000u) & 0x80000000u));
  *sine = L::float_of((odd ? cos_f : sin_f) ^ (sign & 0x80000000u));
}

template <typename F>
FASTDIFF_INLINE void box_muller(typename Lanes<F>::Word word0, typename Lanes<F>::Word word1, F* n0,
                                F* n1) {
  using L = Lanes<F>;
  const F logarithm = natural_log(uniform_of<F>(word0));
  const F radius = L::square_root(L::mul(L::splat(-2.0f), logarithm));
  F cosine, sine;
  cos_sin_turns<F>(word1, &cosine, &sine);
  *n0 = L::mul(radius, cosine);
  *n1 = L::mul(radius, sine);
}

// Elements 4·quad … 4·quad + 3 of one sample.
FASTDIFF_INLINE Normals4 normals_of(Words4 words) {
  Normals4 out;
  box_muller<float>(words.w[0], words.w[1], &out.n[0], &out.n[1]);
  box_muller<float>(words.w[2], words.w[3], &out.n[2], &out.n[3]);
  return out;
}

}  // namespace fastdiff

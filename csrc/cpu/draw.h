// The generator of common/philox.h for kWidth counters at a time; the integers and the floats are
// those of the scalar code, bit for bit, on every instruction set.
#pragma once

#include "../common/philox.h"
#include "lanes.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

// Which array of noise: the counter's words beside the element's, and the key.
struct Stream {
  uint64_t seed;
  uint32_t step;
  uint64_t sample;
};

constexpr int kGroup = 4 * kWidth;  // elements that kWidth counters draw

// A 32-bit word in the low half of each lane; what stands in the high half does not matter.
typedef uint64_t Wide __attribute__((vector_size(4 * kWidth)));

// The full product of the lanes' low halves and a 32-bit factor.
FASTDIFF_VEC Wide product(Wide words, uint32_t factor) {
  const Wide factors = Wide{} + factor;
#if defined(__AVX512F__)
  return reinterpret_cast<Wide>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(words), reinterpret_cast<__m512i>(factors)));
#elif defined(__AVX2__)
  return reinterpret_cast<Wide>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(words), reinterpret_cast<__m256i>(factors)));
#elif defined(__SSE2__)
  return reinterpret_cast<Wide>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(words), reinterpret_cast<__m128i>(factors)));
#else
  return (words & 0xFFFFFFFFu) * factors;
#endif
}

// Even and odd lanes of 32 bits from the low, or the high, halves of two Wides.
FASTDIFF_VEC VecU low_halves(Wide even, Wide odd) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecU>(_mm512_mask_shuffle_epi32(
      reinterpret_cast<__m512i>(even), 0xAAAA, reinterpret_cast<__m512i>(odd), _MM_PERM_CCAA));
#else
  return reinterpret_cast<VecU>((even & 0xFFFFFFFFu) | (odd << 32));
#endif
}

FASTDIFF_VEC VecU high_halves(Wide even, Wide odd) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecU>(_mm512_mask_shuffle_epi32(
      reinterpret_cast<__m512i>(odd), 0x5555, reinterpret_cast<__m512i>(even), _MM_PERM_DDBB));
#else
  return reinterpret_cast<VecU>((even >> 32) | (odd & 0xFFFFFFFF00000000u));
#endif
}

struct Counters {
  Wide c[4];
};

// What the rounds of every counter of one stream have in common: the round keys, and the halves of
// rounds 1 and 2 that do not see the element's word.
struct Schedule {
  uint32_t key0[10];
  uint32_t key1[10];
  uint32_t c2_round1;  // xor'ed into the high product of round 1: c3 ^ key1
  uint32_t c0_round2;  // likewise in round 2, for c0
  uint32_t c2_round2;  // and for c2
  uint32_t c3_round2;  // all of c3 after round 2
};

FASTDIFF_VEC Schedule schedule_of(const Stream& stream) {
  Schedule s;
  uint32_t key0 = static_cast<uint32_t>(stream.seed);
  uint32_t key1 = static_cast<uint32_t>(stream.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    s.key0[round] = key0;
    s.key1[round] = key1;
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
  const uint32_t c1 = stream.step;
  const uint32_t c2 = static_cast<uint32_t>(stream.sample);
  const uint32_t c3 = static_cast<uint32_t>(stream.sample >> 32);
  const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
  const uint32_t c0_after = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ s.key0[0];
  const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0_after;
  s.c2_round1 = c3 ^ s.key1[0];
  s.c0_round2 = static_cast<uint32_t>(product1) ^ s.key0[1];
  s.c2_round2 = static_cast<uint32_t>(product0 >> 32) ^ s.key1[1];
  s.c3_round2 = static_cast<uint32_t>(product0);
  return s;
}

// The counters whose first words are `quads` after nine rounds.
FASTDIFF_VEC Counters nine_rounds(const Schedule& s, Wide quads) {
  Wide c0, c1, c2, c3;
  c3 = product(quads, kPhiloxMultiplier0);  // round 1
  c2 = (c3 >> 32) ^ s.c2_round1;
  c1 = product(c2, kPhiloxMultiplier1);  // round 2
  c0 = (c1 >> 32) ^ s.c0_round2;
  c2 = c3 ^ s.c2_round2;
  c3 = Wide{} + s.c3_round2;
#pragma GCC unroll 7
  for (int round = 2; round < 9; ++round) {
    const Wide product0 = product(c0, kPhiloxMultiplier0);
    const Wide product1 = product(c2, kPhiloxMultiplier1);
    c0 = (product1 >> 32) ^ c1 ^ s.key0[round];
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ s.key1[round];
    c3 = product0;
  }
  return {{c0, c1, c2, c3}};
}

// Philox4x32-10 of the counters whose first words are `quads`; the last round brings them together.
FASTDIFF_VEC void philox(const Schedule& s, VecU quads, VecU words[4]) {
  const Counters even = nine_rounds(s, reinterpret_cast<Wide>(quads));
  const Counters odd = nine_rounds(s, reinterpret_cast<Wide>(quads) >> 32);
  const Wide even0 = product(even.c[0], kPhiloxMultiplier0);
  const Wide even1 = product(even.c[2], kPhiloxMultiplier1);
  const Wide odd0 = product(odd.c[0], kPhiloxMultiplier0);
  const Wide odd1 = product(odd.c[2], kPhiloxMultiplier1);
  words[0] = high_halves(even1, odd1) ^ low_halves(even.c[1], odd.c[1]) ^ s.key0[9];
  words[1] = low_halves(even1, odd1);
  words[2] = high_halves(even0, odd0) ^ low_halves(even.c[3], odd.c[3]) ^ s.key1[9];
  words[3] = low_halves(even0, odd0);
}

// (a0 b0 c0 d0) (a1 b1 c1 d1) …, of each 128-bit part: `to` gets the parts' first rows, then their
// second ones.
FASTDIFF_VEC void store_transposed(Vec a, Vec b, Vec c, Vec d, float* to) {
#if defined(__AVX512F__)
  const auto lo = [](Vec x, Vec y) {
    return reinterpret_cast<__m512d>(
        _mm512_unpacklo_ps(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(y)));
  };
  const auto hi = [](Vec x, Vec y) {
    return reinterpret_cast<__m512d>(
        _mm512_unpackhi_ps(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(y)));
  };
  const __m512d ab0 = lo(a, b), cd0 = lo(c, d), ab2 = hi(a, b), cd2 = hi(c, d);
  _mm512_storeu_pd(to, _mm512_unpacklo_pd(ab0, cd0));
  _mm512_storeu_pd(to + kWidth, _mm512_unpackhi_pd(ab0, cd0));
  _mm512_storeu_pd(to + 2 * kWidth, _mm512_unpacklo_pd(ab2, cd2));
  _mm512_storeu_pd(to + 3 * kWidth, _mm512_unpackhi_pd(ab2, cd2));
#elif defined(__AVX2__)
  const __m256 va = reinterpret_cast<__m256>(a), vb = reinterpret_cast<__m256>(b);
  const __m256 vc = reinterpret_cast<__m256>(c), vd = reinterpret_cast<__m256>(d);
  const __m256d ab0 = _mm256_castps_pd(_mm256_unpacklo_ps(va, vb));
  const __m256d cd0 = _mm256_castps_pd(_mm256_unpacklo_ps(vc, vd));
  const __m256d ab2 = _mm256_castps_pd(_mm256_unpackhi_ps(va, vb));
  const __m256d cd2 = _mm256_castps_pd(_mm256_unpackhi_ps(vc, vd));
  _mm256_storeu_ps(to, _mm256_castpd_ps(_mm256_unpacklo_pd(ab0, cd0)));
  _mm256_storeu_ps(to + kWidth, _mm256_castpd_ps(_mm256_unpackhi_pd(ab0, cd0)));
  _mm256_storeu_ps(to + 2 * kWidth, _mm256_castpd_ps(_mm256_unpacklo_pd(ab2, cd2)));
  _mm256_storeu_ps(to + 3 * kWidth, _mm256_castpd_ps(_mm256_unpackhi_pd(ab2, cd2)));
#else
  for (int i = 0; i < kWidth; ++i) {
    float* row = to + (i % 4) * kWidth + (i / 4) * 4;
    row[0] = a[i];
    row[1] = b[i];
    row[2] = c[i];
    row[3] = d[i];
  }
#endif
}

// Elements 4·first_quad … of the stream into `out`, at least `count` of them in whole groups of
// kGroup: `out` has room for count rounded up.
FASTDIFF_VEC void draw_block(const Stream& stream, uint32_t first_quad, int64_t count,
                             float* __restrict out) {
  const Schedule schedule = schedule_of(stream);
  // Lane 4·part + row draws the quad that store_transposed puts at row·parts + part.
  constexpr int kParts = kWidth / 4;
  VecU lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = kParts * (i % 4) + i / 4;
  for (int64_t element = 0; element < count; element += kGroup) {
    const VecU quads = lanes + (first_quad + static_cast<uint32_t>(element / 4));
    VecU words[4];
    philox(schedule, quads, words);
    Vec n0, n1, n2, n3;
    box_muller<Vec>(words[0], words[1], &n0, &n1);
    box_muller<Vec>(words[2], words[3], &n2, &n3);
    store_transposed(n0, n1, n2, n3, out + element);
  }
}

// Elements [begin, end) of the stream: a pointer into `out`, which has room for the elements and one
// group more.
FASTDIFF_VEC const float* draw_elements(const Stream& stream, int64_t begin, int64_t end,
                                        float* __restrict out) {
  const int64_t lead = begin % 4;
  draw_block(stream, static_cast<uint32_t>(begin / 4), end - begin + lead, out);
  return out + lead;
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

// Sums over places of what two neighbouring channels' values multiply to, for a weight's gradient.
//
// A line of dy is 16 output channels, cut into steps of 32 places; a line of x, 16 input channels at
// any place. A kind of sums says how both stand in scratch memory and adds up a block of kLines lines
// of each, in squares of 16×16 floats.
#pragma once

#include "convolution_products.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

constexpr int64_t kStep = 32;  // places

// Where a block's values begin, at one tap.
struct Factors {
  const char* dy;
  int64_t dy_line;   // bytes from a line to the next
  int64_t dy_image;  // bytes to the smaller pieces of split values
  const char* x;
  int64_t x_line;
  int64_t x_image;
};

// (places, 16) on both sides.
struct Float32Sums {
  struct As : AsFloat32 {
    static constexpr bool kPlain = true;
  };
  static constexpr int64_t kLines = 1;
  static constexpr int64_t kStepBytes = kStep * kLineBytes;
#if defined(__AVX512F__)
  static constexpr int kRows = 16;
#else
  static constexpr int kRows = 4;
#endif

  FASTDIFF_VEC void begin() {}
  FASTDIFF_VEC void end() {}
  FASTDIFF_VEC void put(char* to, int64_t, const Vec* values) { memcpy(to, values, kStepBytes); }

  static void add(const Factors& factors, int64_t steps, float* sums) {
    constexpr int kVectors = 16 / kWidth;
    for (int64_t row = 0; row < 16; row += kRows, sums += kRows * 16) {
      const float* dy = reinterpret_cast<const float*>(factors.dy) + row;
      const float* x = reinterpret_cast<const float*>(factors.x);
      Vec found[kRows][kVectors];
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kVectors; ++j) found[i][j] = load(sums + i * 16 + j * kWidth);
      }
      for (int64_t place = 0; place < steps * kStep; ++place, dy += 16, x += 16) {
        Vec b[kVectors];
        for (int j = 0; j < kVectors; ++j) b[j] = load(x + j * kWidth);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const Vec factor = splat(dy[i]);
          for (int j = 0; j < kVectors; ++j) found[i][j] = fma(factor, b[j], found[i][j]);
        }
      }
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kVectors; ++j) store(sums + i * 16 + j * kWidth, found[i][j]);
      }
    }
  }
};

#if defined(FASTDIFF_PAIRS)
// Sixteen channels of a place and of the one after it in pairs, at every place: a tile of 16 pairs may
// begin anywhere.
template <bool SPLIT>
struct AsPairs {
  static constexpr int64_t kLine = 16;
  static constexpr int64_t kImages = SPLIT ? 2 : 1;
  static constexpr bool kExact = SPLIT;
  static constexpr bool kPlain = true;

  FASTDIFF_VEC void put_bits(char* at, VecHalf half) {
    VecU before;
    memcpy(&before, at - kLineBytes, kLineBytes);
    const VecU bits = widen(half);
    before = (before & 0xFFFFu) | (bits << 16);
    memcpy(at - kLineBytes, &before, kLineBytes);
    memcpy(at, &bits, kLineBytes);
  }
  FASTDIFF_VEC void put(char* at, int64_t image, const Vec* values) {
    const VecHalf high = from_floats(values[0], BFloat16{});
    put_bits(at, high);
    if (!SPLIT) return;
    put_bits(at + image, from_floats(values[0] - to_floats(high, BFloat16{}), BFloat16{}));
  }
};

// A step of dy is a tile of 16 channels by 32 places, contiguous.
template <bool SPLIT>
struct PairSteps {
  using As = AsPairs<SPLIT>;
  static constexpr int64_t kLines = 2;
  static constexpr int64_t kStepBytes = 1024;
  static constexpr int kSquare = 256;  // floats

  FASTDIFF_VEC void put(char* to, int64_t image, const Vec* values) {
    Vec high[16], low[16];
    for (int i = 0; i < 16; ++i) pair(values[2 * i], values[2 * i + 1], high[i], low[i]);
    transpose(high);
    memcpy(to, high, sizeof high);
    if (!SPLIT) return;
    transpose(low);
    memcpy(to + image, low, sizeof low);
  }
};

// Rows of output channels times two registers of input channels, a pair of places at a time.
struct PairSums : PairSteps<false> {
  static constexpr int kRows = 8;

  FASTDIFF_VEC void begin() {}
  FASTDIFF_VEC void end() {}

  static void add(const Factors& factors, int64_t steps, float* sums) {
    for (int64_t k = 0; k < kLines * 16; k += kRows) {
      const char* dy = factors.dy + k / 16 * factors.dy_line + k % 16 * kLineBytes;
      const char* x = factors.x;
      float* const to = sums + k / 16 * kLines * kSquare + k % 16 * 16;
      Vec found[kRows][kLines];
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kLines; ++j) found[i][j] = load(to + j * kSquare + i * 16);
      }
      for (int64_t step = 0; step < steps; ++step, dy += kStepBytes) {
        for (int64_t pair = 0; pair < kStep / 2; ++pair, x += 2 * kLineBytes) {
          Vec b[kLines];
          for (int j = 0; j < kLines; ++j) {
            b[j] = load(reinterpret_cast<const float*>(x + j * factors.x_line));
          }
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            const Vec factor = splat_word(dy + i * kLineBytes + pair * 4);
            for (int j = 0; j < kLines; ++j) found[i][j] = PairWords::add(found[i][j], factor, b[j]);
          }
        }
      }
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kLines; ++j) store(to + j * kSquare + i * 16, found[i][j]);
      }
    }
  }
};
#endif

#if defined(FASTDIFF_AMX)
// Tiles of bfloat16, or the three products of split values.
template <bool SPLIT>
struct TileSums : PairSteps<SPLIT> {
  using PairSteps<SPLIT>::kStepBytes, PairSteps<SPLIT>::kSquare;

  FASTDIFF_VEC void begin() { configure_tiles(0, 16); }
  FASTDIFF_VEC void end() { _tile_release(); }

  // Tiles: sums 0 to 3, dy 4 and 5, x 6 and 7.
  static void add(const Factors& factors, int64_t steps, float* sums) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + kSquare, 64);
    _tile_loadd(2, sums + 2 * kSquare, 64);
    _tile_loadd(3, sums + 3 * kSquare, 64);
    const char *dy = factors.dy, *x = factors.x;
#define FASTDIFF_DY(from)     \
  _tile_loadd(4, (from), 64); \
  _tile_loadd(5, (from) + factors.dy_line, 64)
#define FASTDIFF_X(from)                  \
  _tile_loadd(6, (from), 2 * kLineBytes); \
  _tile_loadd(7, (from) + factors.x_line, 2 * kLineBytes)
#define FASTDIFF_PRODUCTS() \
  _tile_dpbf16ps(0, 4, 6);  \
  _tile_dpbf16ps(1, 4, 7);  \
  _tile_dpbf16ps(2, 5, 6);  \
  _tile_dpbf16ps(3, 5, 7)
    for (int64_t step = 0; step < steps; ++step, dy += kStepBytes, x += kStep * kLineBytes) {
      FASTDIFF_DY(dy);
      FASTDIFF_X(x);
      FASTDIFF_PRODUCTS();
      if (SPLIT) {
        FASTDIFF_X(x + factors.x_image);
        FASTDIFF_PRODUCTS();
        FASTDIFF_DY(dy + factors.dy_image);
        FASTDIFF_X(x);
        FASTDIFF_PRODUCTS();
      }
    }
#undef FASTDIFF_DY
#undef FASTDIFF_X
#undef FASTDIFF_PRODUCTS
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + kSquare, 64);
    _tile_stored(2, sums + 2 * kSquare, 64);
    _tile_stored(3, sums + 3 * kSquare, 64);
  }
};
#endif

}  // namespace fastdiff::cpu::FASTDIFF_ISA

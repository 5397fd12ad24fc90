// The products of a convolution: blocks of neighbouring outputs times blocks of output channels.
//
// Each kind packs the weight for itself: for every block of kOutputs output channels, lines of input
// channels, and in these taps, in the order in which they are multiplied.
#pragma once

#include "convolution_fill.h"
#include "tiles.h"
#include "transpose.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

// Where a block of outputs reads: its first place in the first line, with the image's bytes.
struct Left {
  const char* places;
  int64_t line;   // bytes from a line of channels to the next
  int64_t image;  // bytes to the smaller pieces of split values
  int64_t lines;
  int64_t taps;
  const int64_t* offset;       // of each tap, in places
  int64_t place = kLineBytes;  // bytes from a place to the next
  const Left* then = nullptr;  // further lines, of a second source
};

template <typename Each>
FASTDIFF_VEC void for_each_tap(const Left& left, const Each& each) {
  for (int64_t line = 0; line < left.lines; ++line) {
    const char* at = left.places + line * left.line;
    for (int64_t tap = 0; tap < left.taps; ++tap) {
      each(at + left.offset[tap] * kLineBytes);
    }
  }
}

// A right factor, elements apart by strides: a convolution's weight; zero beyond its channels.
template <typename T>
struct Weights {
  const T* from;
  int64_t out_channels, channels, taps;
  int64_t out_stride, channel_stride, tap_stride;

  // kWidth input channels from `in` on, of one output channel.
  FASTDIFF_MEMBER Vec row(int64_t out, int64_t in, int64_t tap) const {
    return elements(out, in, tap, out < out_channels ? channels - in : 0, channel_stride);
  }
  // kWidth output channels from `out` on, of one input channel.
  FASTDIFF_MEMBER Vec column(int64_t out, int64_t in, int64_t tap) const {
    return elements(out, in, tap, in < channels ? out_channels - out : 0, out_stride);
  }
  // Whether columns lie side by side, as in a transposed weight.
  FASTDIFF_MEMBER bool in_columns() const { return out_stride == 1 && channel_stride != 1; }

 private:
  FASTDIFF_MEMBER Vec elements(int64_t out, int64_t in, int64_t tap, int64_t most,
                               int64_t stride) const {
    const int64_t count = larger(0, smaller(kWidth, most));
    const T* at = from + out * out_stride + in * channel_stride + tap * tap_stride;
    if (count == kWidth && stride == 1) return load(at);
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {  // value by value, through memory, packing takes twice as long
      if (count == kWidth && stride < 1 << 26 && stride > -(1 << 26)) {
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i all = _mm512_set1_epi32(static_cast<int>(stride));
        return Vec(_mm512_i32gather_ps(_mm512_mullo_epi32(lane, all), at, 4));
      }
    }
#endif
    float values[kWidth] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = to_float(at[i * stride]);
    return load(values);
  }
};

// A word of 32 bits, whatever it means, in every lane.
FASTDIFF_VEC Vec splat_word(const char* from) {
  uint32_t word;
  memcpy(&word, from, sizeof word);
  return as_floats(VecU{} + word);
}

// Rows of outputs times two registers of output channels, word by word of a line: 32 bits, which Words
// knows the meaning of. It has As, pack, add(sums, word, weights), and where the registers of weights
// stand: kStep words from one word's to the next one's, and kSide from a word's first to its second.
template <typename Words>
struct RowProducts : Words {
  static constexpr bool kReadsX = false;  // whether places may be where x has them
  static constexpr int kVectors = 2;
  static constexpr int kOutputs = kVectors * kWidth;
#if defined(__AVX512F__)
  static constexpr int kRows = 12;  // 24 of 32 registers
#elif defined(__AVX2__)
  static constexpr int kRows = 5;  // 10 of 16
#else
  static constexpr int kRows = 4;
#endif
  static constexpr int kPositions = 2 * kRows;
  static constexpr int64_t kWords = kLineBytes / 4;
  static constexpr int64_t kTapBytes = kWords * kOutputs * 4;

  FASTDIFF_MEMBER void begin(int64_t) {}
  FASTDIFF_MEMBER void end() {}
  FASTDIFF_MEMBER int64_t positions(int64_t) const { return kPositions; }

  template <int ROWS>
  static void multiply_rows(const Left& left, const float* panel, int64_t rows, float* to) {
    if constexpr (ROWS > 1) {
      if (rows < ROWS) return multiply_rows<ROWS - 1>(left, panel, rows, to);
    }
    Vec sums[ROWS][kVectors] = {};
    for_each_tap(left, [&](const char* at) {
      for (int64_t c = 0; c < kWords; ++c) {
        Vec b[kVectors];
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) {
          b[j] = load(panel + c * Words::kStep + j * Words::kSide);
        }
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i) {
          const Vec factor = splat_word(at + i * kLineBytes + c * 4);
#pragma GCC unroll 2
          for (int j = 0; j < kVectors; ++j) sums[i][j] = Words::add(sums[i][j], factor, b[j]);
        }
      }
      panel += kTapBytes / 4;
    });
    for (int i = 0; i < ROWS; ++i) {
      for (int j = 0; j < kVectors; ++j) store(to + i * kOutputs + j * kWidth, sums[i][j]);
    }
  }

  static void multiply(Left left, const char* panel, int64_t positions, float* to) {
    while (positions > 0) {
      const int64_t rows = smaller(positions, kRows);
      multiply_rows<kRows>(left, reinterpret_cast<const float*>(panel), rows, to);
      left.places += rows * kLineBytes;
      to += rows * kOutputs;
      positions -= rows;
    }
  }
};

// One channel of float32. Weights: (channels, outputs).
struct Float32Words {
  using As = AsFloat32;
  static constexpr int kOutputs = 2 * kWidth;
  static constexpr int kStep = kOutputs, kSide = kWidth;

  FASTDIFF_VEC Vec add(Vec sums, Vec value, Vec weights) { return fma(value, weights, sums); }

  template <typename T>
  static void pack(char* to, const Weights<T>& weights, int64_t out, int64_t in, int64_t tap) {
    if (weights.in_columns()) {
      for (int64_t c = 0; c < As::kLine; ++c) {
        for (int64_t k = 0; k < kOutputs; k += kWidth) {
          store(reinterpret_cast<float*>(to) + c * kOutputs + k,
                weights.column(out + k, in + c, tap));
        }
      }
      return;
    }
    for (int64_t c = 0; c < As::kLine; c += kWidth) {
      for (int64_t k = 0; k < kOutputs; k += kWidth) {
        Vec rows[kWidth];
        for (int i = 0; i < kWidth; ++i) rows[i] = weights.row(out + k + i, in + c, tap);
        transpose(rows);
        float* at = reinterpret_cast<float*>(to) + c * kOutputs + k;
        for (int i = 0; i < kWidth; ++i) store(at + i * kOutputs, rows[i]);
      }
    }
  }
};
using Float32Products = RowProducts<Float32Words>;

#if defined(FASTDIFF_PAIRS)
// Two values of each lane side by side in bfloat16, and what that leaves of them. A pair is a float32
// as far as a transposition knows.
FASTDIFF_VEC void pair(Vec first, Vec second, Vec& high, Vec& low) {
  const auto join = [](VecHalf a, VecHalf b) { return as_floats(widen(a) | (widen(b) << 16)); };
  const VecHalf a = from_floats(first, BFloat16{}), b = from_floats(second, BFloat16{});
  high = join(a, b);
  low = join(from_floats(first - to_floats(a, BFloat16{}), BFloat16{}),
             from_floats(second - to_floats(b, BFloat16{}), BFloat16{}));
}

// Weights in bfloat16: two tiles of 16 outputs each, of pairs of input channels side by side, (channels
// / 2, outputs, 2); of split values two more, of the smaller pieces.
template <bool SPLIT>
struct PairPanels {
  static constexpr int kOutputs = 32;
  static constexpr int64_t kTileBytes = 1024;
  static constexpr int64_t kTapBytes = (SPLIT ? 4 : 2) * kTileBytes;

  template <typename T>
  static void pack(char* to, const Weights<T>& weights, int64_t out, int64_t in, int64_t tap) {
    for (int64_t half = 0; half < 2; ++half) {
      Vec high[16], low[16];
      const bool in_columns = weights.in_columns();
      for (int i = 0; in_columns && i < 16; ++i) {
        pair(weights.column(out + half * 16, in + 2 * i, tap),
             weights.column(out + half * 16, in + 2 * i + 1, tap), high[i], low[i]);
      }
      for (int k = 0; !in_columns && k < 16; ++k) {
        BFloat16 of_high[32], of_low[32];
        for (int part = 0; part < 2; ++part) {
          const Vec v = weights.row(out + half * 16 + k, in + part * 16, tap);
          store(of_high + part * 16, v);
          store(of_low + part * 16, v - load(of_high + part * 16));
        }
        memcpy(&high[k], of_high, sizeof of_high);
        memcpy(&low[k], of_low, sizeof of_low);
      }
      if (!in_columns) transpose(high);
      memcpy(to + half * kTileBytes, high, sizeof high);
      if (!SPLIT) continue;
      if (!in_columns) transpose(low);
      memcpy(to + (2 + half) * kTileBytes, low, sizeof low);
    }
  }
};

// Two channels of bfloat16, whose products the sum takes one after the other, each rounded; subnormal
// factors and sums are zero.
struct PairWords : PairPanels<false> {
  using As = AsBFloat16;
  static constexpr int kStep = kWidth, kSide = kTileBytes / 4;

  FASTDIFF_VEC Vec add(Vec sums, Vec pair, Vec weights) {
    return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums),
                                                  reinterpret_cast<__m512bh>(pair),
                                                  reinterpret_cast<__m512bh>(weights)));
  }
};
using PairProducts = RowProducts<PairWords>;
#endif

#if defined(FASTDIFF_AMX)
// 2×2 tiles of 16 outputs and 16 channels, in bfloat16; or the three products of split values.
template <bool SPLIT>
struct TileProducts : PairPanels<SPLIT> {
  using As = std::conditional_t<SPLIT, AsSplit, AsBFloat16>;
  using PairPanels<SPLIT>::kOutputs, PairPanels<SPLIT>::kTileBytes, PairPanels<SPLIT>::kTapBytes;
  static constexpr bool kReadsX = !SPLIT;
  static constexpr int kPositions = 32;
  int64_t rows = 0;  // of a tile of outputs

  // For blocks of `outputs` in all, in tiles of one height.
  FASTDIFF_MEMBER void begin(int64_t outputs) {
    const int64_t tiles = ceil_div(outputs, 16);
    rows = ceil_div(outputs, tiles);
    configure_tiles(6, rows);
  }
  FASTDIFF_MEMBER void end() { _tile_release(); }
  FASTDIFF_MEMBER int64_t positions(int64_t) const { return 2 * rows; }

  // Tiles: sums 0 to 3, outputs 4 and 5, weights 6 and 7.
  template <bool TWO>
  FASTDIFF_MEMBER void multiply_tiles(const Left& left, const char* panel, float* to,
                                      int64_t pitch, bool more) const {
    const int64_t row_bytes = pitch * 4;
    _tile_zero(0);
    _tile_zero(1);
    if (TWO) {
      _tile_zero(2);
      _tile_zero(3);
    }
    if (more) {
      _tile_loadd(0, to, row_bytes);
      _tile_loadd(1, to + 16, row_bytes);
      if (TWO) _tile_loadd(2, to + rows * pitch, row_bytes);
      if (TWO) _tile_loadd(3, to + rows * pitch + 16, row_bytes);
    }
#define FASTDIFF_OUTPUTS(from)   \
  _tile_loadd(4, (from), place); \
  if (TWO) _tile_loadd(5, (from) + rows * place, place)
#define FASTDIFF_WEIGHTS(from)        \
  _tile_loadd(6, (from), kLineBytes); \
  _tile_loadd(7, (from) + kTileBytes, kLineBytes)
#define FASTDIFF_PRODUCTS()  \
  _tile_dpbf16ps(0, 4, 6);   \
  _tile_dpbf16ps(1, 4, 7);   \
  if (TWO) {                 \
    _tile_dpbf16ps(2, 5, 6); \
    _tile_dpbf16ps(3, 5, 7); \
  }
    for (const Left* source = &left; source != nullptr; source = source->then) {
      const int64_t place = source->place;
      for_each_tap(*source, [&](const char* at) {
        FASTDIFF_OUTPUTS(at);
        FASTDIFF_WEIGHTS(panel);
        FASTDIFF_PRODUCTS();
        if (SPLIT) {
          FASTDIFF_WEIGHTS(panel + 2 * kTileBytes);
          FASTDIFF_PRODUCTS();
          FASTDIFF_OUTPUTS(at + source->image);
          FASTDIFF_WEIGHTS(panel);
          FASTDIFF_PRODUCTS();
        }
        panel += kTapBytes;
      });
    }
#undef FASTDIFF_OUTPUTS
#undef FASTDIFF_WEIGHTS
#undef FASTDIFF_PRODUCTS
    _tile_stored(0, to, row_bytes);
    _tile_stored(1, to + 16, row_bytes);
    if (TWO) {
      _tile_stored(2, to + rows * pitch, row_bytes);
      _tile_stored(3, to + rows * pitch + 16, row_bytes);
    }
  }

  // Rows of the result are `pitch` floats apart; `more`: it is added to what is there.
  FASTDIFF_MEMBER void multiply(const Left& left, const char* panel, int64_t positions, float* to,
                                int64_t pitch = kOutputs, bool more = false) const {
    if (positions > rows) {
      multiply_tiles<true>(left, panel, to, pitch, more);
    } else {
      multiply_tiles<false>(left, panel, to, pitch, more);
    }
  }
};
#endif

}  // namespace fastdiff::cpu::FASTDIFF_ISA

// A convolution's input into scratch memory: read once, normalised, activated, rounded.
#pragma once

#include <type_traits>

#include "convolution_geometry.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

constexpr int64_t kLineBytes = 64;

// Elements as they stand in scratch: 16 channels of a place. kPlain: only ever of x as it is.
template <typename T>
struct AsStored {
  static constexpr int64_t kLine = kLineBytes / sizeof(T);
  static constexpr int64_t kImages = 1;
  static constexpr bool kExact = sizeof(T) == 4;
  static constexpr bool kPlain = false;
  FASTDIFF_VEC void put(char* at, int64_t, const Vec* values) {
    for (int i = 0; i < 16 / kWidth; ++i) store(reinterpret_cast<T*>(at) + i * kWidth, values[i]);
  }
};
using AsFloat32 = AsStored<float>;
using AsBFloat16 = AsStored<BFloat16>;

// The value rounded, and `image` bytes on what that leaves, rounded.
struct AsSplit {
  static constexpr int64_t kLine = 32;
  static constexpr int64_t kImages = 2;
  static constexpr bool kExact = true;
  static constexpr bool kPlain = false;
  FASTDIFF_VEC void put(char* at, int64_t image, const Vec* values) {
    for (int i = 0; i < 16 / kWidth; ++i) {
      BFloat16* to = reinterpret_cast<BFloat16*>(at) + i * kWidth;
      const VecHalf high = from_floats(values[i], BFloat16{});
      store(to, values[i]);
      store(reinterpret_cast<BFloat16*>(reinterpret_cast<char*>(to) + image),
            values[i] - to_floats(high, BFloat16{}));
    }
  }
};

// Sixteen channels of one sample: where they are and what is done to them.
template <typename T>
struct Channels {
  const T* from;       // of the sample's first place
  int64_t stride;      // elements from place to place
  int count;           // of the sixteen that there are
  const float* scale;  // of these channels, or null
  const float* shift;
  bool silu;
};

// One row of a plane: `count` places from `to` on, every step-th input place from `from` on, or each
// of them twice.
template <typename T, typename As, bool FULL, bool AFFINE, bool SILU>
static void fill_places(char* to, int64_t image, const Channels<T>& channels, int64_t count,
                        int64_t first, int64_t step, int doubled) {
  constexpr int kParts = 16 / kWidth;
  Vec scale[kParts], shift[kParts], values[kParts];
  int in_part[kParts];
  for (int i = 0; i < kParts; ++i) {
    in_part[i] = static_cast<int>(larger(0, smaller(kWidth, channels.count - i * kWidth)));
    if (!AFFINE) continue;
    scale[i] =
        FULL ? load(channels.scale + i * kWidth) : load_n(channels.scale + i * kWidth, in_part[i]);
    shift[i] =
        FULL ? load(channels.shift + i * kWidth) : load_n(channels.shift + i * kWidth, in_part[i]);
  }
  using Stored = std::conditional_t<As::kExact, float, BFloat16>;  // how exact a sigmoid must be
  for (int64_t place = 0; place < count; ++place) {
    const T* from = channels.from + ((first + place * step) >> doubled) * channels.stride;
    for (int i = 0; i < kParts; ++i) {
      Vec v = FULL ? load(from + i * kWidth) : load_n(from + i * kWidth, in_part[i]);
      if (AFFINE) v = fma(v, scale[i], shift[i]);
      values[i] = activate<Stored, SILU>(v);
    }
    As::put(to + place * kLineBytes, image, values);
  }
}

template <typename T, typename As>
static void fill_row(char* to, int64_t image, const Channels<T>& channels, int64_t count,
                     int64_t first, int64_t step, int doubled) {
  const bool full = channels.count == 16, affine = channels.scale != nullptr;
#define FASTDIFF_FILL(FULL, AFFINE, SILU) \
  fill_places<T, As, FULL, AFFINE, SILU>(to, image, channels, count, first, step, doubled)
  if constexpr (As::kPlain) {
    return full ? FASTDIFF_FILL(true, false, false) : FASTDIFF_FILL(false, false, false);
  } else {
    if (full && affine && channels.silu) return FASTDIFF_FILL(true, true, true);
    if (full && affine) return FASTDIFF_FILL(true, true, false);
    if (full && !channels.silu) return FASTDIFF_FILL(true, false, false);
    if (full) return FASTDIFF_FILL(true, false, true);
    if (affine && channels.silu) return FASTDIFF_FILL(false, true, true);
    if (affine) return FASTDIFF_FILL(false, true, false);
    if (channels.silu) return FASTDIFF_FILL(false, false, true);
    return FASTDIFF_FILL(false, false, false);
  }
#undef FASTDIFF_FILL
}

// Sixteen channels of output rows [first, first + rows) of one sample, at `to` (of their line).
template <typename T, typename As>
static void fill_channels(char* to, int64_t image, const Geometry& g, const ConvolutionShape& s,
                          const Channels<T>& channels, int64_t first, int64_t rows) {
  const int64_t stride = s.stride, in_rows = g.rows.in, in_columns = g.columns.in;
  const int doubled = s.upsample ? 1 : 0;
  const auto zero = [&](char* at, int64_t count) {
    const Vec none[16 / kWidth] = {};
    for (int64_t i = 0; i < count; ++i) As::put(at + i * kLineBytes, image, none);
  };
  for (int64_t plane = 0; plane < g.planes; ++plane) {
    char* row = to + plane * g.plane_places * kLineBytes;
    const int64_t down = plane / stride, across = plane % stride;
    // Places of a row that the input has.
    const int64_t there =
        smaller(g.pitch - g.before, ceil_div(larger(0, in_columns - across), stride));
    for (int64_t r = first - g.above; r < first + rows + g.below; ++r) {
      const int64_t y = r * stride + down;
      if (y < 0 || y >= in_rows) {
        zero(row, g.pitch);
      } else {
        Channels<T> of_row = channels;
        of_row.from += (y >> doubled) * s.width * channels.stride;
        zero(row, g.before);
        fill_row<T, As>(row + g.before * kLineBytes, image, of_row, there, across, stride, doubled);
        zero(row + (g.before + there) * kLineBytes, g.pitch - g.before - there);
      }
      row += g.pitch * kLineBytes;
    }
    zero(row, g.plane_places - (g.band + g.above + g.below) * g.pitch + (g.band - rows) * g.pitch);
  }
}

// Channels [c, c + 16) of output rows [first, first + rows) of one sample, zeros where there are none.
template <typename T, typename As>
static void fill(char* to, int64_t image, const Geometry& g, const ConvolutionShape& s,
                 const ConvolutionCall& call, int64_t sample, int64_t c, int64_t first,
                 int64_t rows) {
  const int64_t all = s.channels + s.second_channels;
  const float* scale =
      call.coefficients == nullptr ? nullptr : call.coefficients + sample * 2 * all + c;
  const bool second = c >= s.channels;
  const int64_t width = second ? s.second_channels : s.channels;
  const int64_t within = second ? c - s.channels : c;
  const T* from = static_cast<const T*>(second ? call.second : call.x);
  const Channels<T> channels = {from + sample * s.height * s.width * width + within,
                                width,
                                static_cast<int>(larger(0, smaller(16, width - within))),
                                scale,
                                scale == nullptr ? nullptr : scale + all,
                                s.silu};
  fill_channels<T, As>(to, image, g, s, channels, first, rows);
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

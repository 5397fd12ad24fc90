// How a convolution's input stands in scratch memory, so that every tap is a shift.
//
// A kernel's tap reads the input at the output's place times the stride, plus an offset. Columns and
// rows are sorted by their remainder modulo the stride into planes; in a plane a tap is a shift by
// whole columns and rows, with any stride. A plane's rows stand one behind the other, with zeros
// between them that serve both: the shift is then the same number of places wherever the output is,
// and a block of neighbouring outputs reads a block of neighbouring places. Outputs that fall on the
// zeros are computed with the others and not stored.
//
// A place holds 64 bytes of channels (a line): 16 of float32, 32 of bfloat16. Further channels stand
// behind all places of the first ones.
#pragma once

#include "../common/convolution.h"
#include "threads.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

constexpr int kMostTaps = 49;  // 7×7

// Where a doubled image is convolved as it was before. The output at 2i + a reads, by tap t, the place
// i + ⌊(a + t − padding) / 2⌋: the taps that read the same one are added up in advance, and for each
// remainder (a, b) of rows and columns (a part) remains a convolution of its own, with (taps + 1) / 2
// of an odd number of taps each way. This is the one whose input serves all parts: they have their
// taps among its own.
inline ConvolutionShape undoubled(ConvolutionShape s) {
  if (!s.folded) return s;
  const auto reach = [&](int64_t taps) { return s.padding % 2 + (taps - s.padding % 2) / 2 + 1; };
  s.kernel_height = reach(s.kernel_height);
  s.kernel_width = reach(s.kernel_width);
  s.padding = ceil_div(s.padding, 2);
  s.out_height = ceil_div(s.out_height, 2);
  s.out_width = ceil_div(s.out_width, 2);
  s.upsample = false;
  return s;
}

// How many convolutions a call is.
FASTDIFF_VEC int64_t parts_of(const ConvolutionShape& s) { return s.folded ? 4 : 1; }

// The outputs of one of them.
struct Parity {
  int64_t row, column;  // the first
  int64_t step;         // to the next, each way
  int64_t rows, columns;

  Parity(const ConvolutionShape& s, int64_t part)
      : row(part / 2),
        column(part % 2),
        step(s.folded ? 2 : 1),
        rows(ceil_div(s.out_height - row, step)),
        columns(ceil_div(s.out_width - column, step)) {}
};

// One dimension of it.
struct Side {
  int64_t stride;
  int64_t padding;
  int64_t taps;
  int64_t in;   // elements of the (doubled) input
  int64_t out;  // of the output

  FASTDIFF_MEMBER int64_t plane(int64_t tap) const {
    const int64_t rest = (tap - padding) % stride;
    return rest < 0 ? rest + stride : rest;
  }
  FASTDIFF_MEMBER int64_t shift(int64_t tap) const {
    return (tap - padding - plane(tap)) / stride;
  }
  FASTDIFF_MEMBER int64_t before() const {
    int64_t most = 0;
    for (int64_t tap = 0; tap < taps; ++tap) most = larger(most, -shift(tap));
    return most;
  }
  FASTDIFF_MEMBER int64_t after() const {
    int64_t most = 0;
    for (int64_t tap = 0; tap < taps; ++tap) most = larger(most, shift(tap));
    return most;
  }
  // Whether what stands after the last output is zero in every plane.
  FASTDIFF_MEMBER bool ends() const { return out * stride >= in; }
};

struct Geometry {
  Side rows, columns;
  int64_t planes;  // stride²
  int64_t before;  // places of a plane's row before the first output's
  int64_t pitch;   // places of a plane's row
  int64_t above, below;
  int taps;
  int64_t offset[kMostTaps];  // of a tap's place from an output's, for `band` output rows
  int64_t band;               // output rows that scratch is for
  int64_t plane_places;
  int64_t places;  // of one line of channels: all planes

  Geometry(const ConvolutionShape& s, int64_t band_rows)
      : rows{s.stride, s.padding, s.kernel_height, s.height << s.upsample, s.out_height},
        columns{s.stride, s.padding, s.kernel_width, s.width << s.upsample, s.out_width},
        planes(s.stride * s.stride),
        before(columns.before()),
        above(rows.before()),
        below(rows.after()),
        taps(static_cast<int>(s.kernel_height * s.kernel_width)),
        band(band_rows) {
    const int64_t after = columns.after();
    pitch = columns.out + (columns.ends() ? larger(before, after) : before + after);
    // The last row's taps reach `after` places beyond it, and blocks of outputs are filled up.
    plane_places = (band + above + below) * pitch + after + kSlack;
    places = planes * plane_places;
    for (int64_t i = 0; i < rows.taps; ++i) {
      for (int64_t j = 0; j < columns.taps; ++j) {
        offset[i * columns.taps + j] =
            (rows.plane(i) * s.stride + columns.plane(j)) * plane_places +
            (above + rows.shift(i)) * pitch + before + columns.shift(j);
      }
    }
  }

  // Outputs of so many rows, those between the rows among them.
  FASTDIFF_MEMBER int64_t outputs(int64_t count) const {
    return (count - 1) * pitch + columns.out;
  }

  static constexpr int64_t kSlack = 32;
};

}  // namespace fastdiff::cpu::FASTDIFF_ISA

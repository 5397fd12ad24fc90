// A 3×3 convolution of stride 1 with fewer products: F(M×M, 3×3), M = 2 or 4.
//
// Outputs are tiles of M×M. With N = M + 2, a tile's input d (N×N) and a kernel g (3×3),
//
//   y = Aᵀ [ (G g Gᵀ) ∘ (Bᵀ d B) ] A        Winograd 1980; Lavin & Gray 2016, equation 8
//
// so N² products of channels serve M² outputs: 4 products per output for M = 2, 2.25 for M = 4, in
// place of 9. Bᵀ, G and Aᵀ evaluate and interpolate polynomials at the points 0, ±p … and infinity.
// Element (i, j) of all tiles' transforms is a plane: a (tiles, channels) matrix, times the weights'
// (channels, out_channels) of this element.
//
// A thread transforms its bands' tiles for all input channels, sixteen at a time, so that the
// normalised input is in L1 only; the transforms stay in L2. Then, one block of output channels after
// the other, it multiplies all planes and transforms the products into rows of outputs. The weights,
// N²/9 times as many as the convolution's, stream through once for all of the thread's tiles.
#pragma once

#include "convolution_products.h"
#include "convolution_results.h"
#include "matmul.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

template <int M>
struct Points;

// 0, ±1, infinity.
template <>
struct Points<2> {
  FASTDIFF_VEC void input(const Vec* d, Vec* to) {  // Bᵀ d
    to[0] = d[0] - d[2];
    to[1] = d[2] + d[1];
    to[2] = d[2] - d[1];
    to[3] = d[3] - d[1];
  }
  FASTDIFF_VEC void weight(const Vec* g, Vec* to) {  // G g
    const Vec half = splat(0.5f), even = g[0] + g[2];
    to[0] = g[0];
    to[1] = (even + g[1]) * half;
    to[2] = (even - g[1]) * half;
    to[3] = g[2];
  }
  FASTDIFF_VEC void output(const Vec* m, Vec* to) {  // Aᵀ m
    to[0] = m[0] + (m[1] + m[2]);
    to[1] = m[3] + (m[1] - m[2]);
  }
};

// 0, ±5/8, ±3/2, infinity: against 0, ±1, ±2 a fifth of the largest error and half of the mean one,
// and every coefficient is exact in float32.
template <>
struct Points<4> {
  static constexpr float kP = 0.625f, kQ = 1.5f;
  static constexpr float kP2 = kP * kP, kQ2 = kQ * kQ;

  FASTDIFF_VEC void input(const Vec* d, Vec* to) {
    to[0] = fma(d[0], splat(kP2 * kQ2), fma(d[2], splat(-kP2 - kQ2), d[4]));
    const Vec even_p = fma(d[2], splat(-kQ2), d[4]), odd_p = fma(d[1], splat(-kQ2), d[3]);
    to[1] = fma(odd_p, splat(kP), even_p);
    to[2] = fma(odd_p, splat(-kP), even_p);
    const Vec even_q = fma(d[2], splat(-kP2), d[4]), odd_q = fma(d[1], splat(-kP2), d[3]);
    to[3] = fma(odd_q, splat(kQ), even_q);
    to[4] = fma(odd_q, splat(-kQ), even_q);
    to[5] = fma(d[1], splat(kP2 * kQ2), fma(d[3], splat(-kP2 - kQ2), d[5]));
  }
  FASTDIFF_VEC void weight(const Vec* g, Vec* to) {
    constexpr double p2 = kP2, q2 = kQ2;
    const Vec of_p = splat(static_cast<float>(1 / (2 * p2 * (p2 - q2))));
    const Vec of_q = splat(static_cast<float>(1 / (2 * q2 * (q2 - p2))));
    const Vec even_p = fma(g[2], splat(kP2), g[0]), even_q = fma(g[2], splat(kQ2), g[0]);
    to[0] = g[0] * splat(static_cast<float>(1 / (p2 * q2)));
    to[1] = fma(g[1], splat(kP), even_p) * of_p;
    to[2] = fma(g[1], splat(-kP), even_p) * of_p;
    to[3] = fma(g[1], splat(kQ), even_q) * of_q;
    to[4] = fma(g[1], splat(-kQ), even_q) * of_q;
    to[5] = g[2];
  }
  FASTDIFF_VEC void output(const Vec* m, Vec* to) {
    const Vec even_p = m[1] + m[2], odd_p = m[1] - m[2];
    const Vec even_q = m[3] + m[4], odd_q = m[3] - m[4];
    to[0] = m[0] + (even_p + even_q);
    to[1] = fma(odd_p, splat(kP), odd_q * splat(kQ));
    to[2] = fma(even_p, splat(kP2), even_q * splat(kQ2));
    to[3] = fma(odd_p, splat(kP2 * kP), fma(odd_q, splat(kQ2 * kQ), m[5]));
  }
};

template <int M>
class Winograd {
 public:
  using As = AsFloat32;
  static constexpr int64_t kOutputs = kPanel;
  static constexpr int64_t kRows = M;          // output rows that belong together
  static constexpr int64_t kFewOutputs = 384;  // of a thread
  // Two thirds of an L2 of 2 MiB: the more tiles, the fewer times do the weights come from behind it.
  static constexpr int64_t kCacheBytes = 1408 << 10;

  // What stays in the cache for a band of so many rows: transforms for all channels.
  static int64_t band_bytes(const ConvolutionShape& s, int64_t rows) {
    return ceil_div(rows, M) * across_of(s) * kPlanes * pitch_of(s) * 4;
  }

  // Floats of scratch that a thread needs for `group` bands.
  static int64_t scratch(const ConvolutionShape& s, int64_t rows, int64_t group) {
    return Sizes(s, rows, group).floats();
  }

  static int64_t panel_bytes(int64_t out_channels, int64_t channels, int64_t) {
    return kPlanes * depth_of(channels) * padded(out_channels) * 4;
  }

  // One line of input channels for one block of output channels: (planes, channels, outputs).
  static void pack(char* panels, const Weights<float>& weights, int64_t block, int64_t line) {
    const int64_t first = block * kOutputs, depth = depth_of(weights.channels);
    const int64_t width = padded(smaller(kOutputs, weights.out_channels - first));
    float* to = reinterpret_cast<float*>(panels) + kPlanes * depth * first;
    for (int64_t c = line * As::kLine; c < (line + 1) * As::kLine; c += kWidth) {
      for (int64_t k = 0; k < width; k += kWidth) {
        Vec taps[9][kWidth];  // of one input channel, the output channels side by side
        for (int tap = 0; tap < 9; ++tap) {
          for (int i = 0; i < kWidth; ++i) taps[tap][i] = weights.row(first + k + i, c, tap);
          transpose(taps[tap]);
        }
        for (int within = 0; within < kWidth; ++within) {
          Vec half[3][N], element[N];
          for (int j = 0; j < 3; ++j) {
            const Vec column[3] = {taps[j][within], taps[3 + j][within], taps[6 + j][within]};
            Points<M>::weight(column, half[j]);
          }
          for (int i = 0; i < N; ++i) {
            const Vec row[3] = {half[0][i], half[1][i], half[2][i]};
            Points<M>::weight(row, element);
            for (int j = 0; j < N; ++j) {
              store(to + ((i * N + j) * depth + c + within) * width + k, element[j]);
            }
          }
        }
      }
    }
  }

  Winograd(const ConvolutionShape& shape, const ConvolutionCall& call, int64_t band_rows,
           int64_t group, float* scratch)
      : shape_(shape),
        call_(call),
        sizes_(shape, band_rows, group),
        line_(scratch),
        inputs_(line_ + sizes_.line),
        products_(inputs_ + kPlanes * sizes_.inputs_plane),
        outputs_(products_ + kPlanes * sizes_.products_plane) {}

  // Output rows [top, top + rows) of a sample as the tiles from `at` on; returns the next one.
  template <typename T>
  int64_t fill(int64_t at, int64_t sample, int64_t top, int64_t rows) {
    const int64_t tile_rows = ceil_div(rows, M);
    for (int64_t c = 0; c < sizes_.depth; c += As::kLine) {
      FASTDIFF_ISA::fill<T, As>(reinterpret_cast<char*>(line_), 0, sizes_.geometry, shape_, call_,
                                sample, c, top, rows);
      for (int64_t row = 0; row < tile_rows; ++row) {
        for (int64_t column = 0; column < sizes_.across; ++column) {
          const float* from = line_ + (row * M * sizes_.geometry.pitch + column * M) * As::kLine;
          float* to = inputs_ + (at + row * sizes_.across + column) * sizes_.pitch + c;
          for (int64_t v = 0; v < As::kLine; v += kWidth) transform_input(from + v, to + v);
        }
      }
    }
    return at + tile_rows * sizes_.across;
  }

  // Products of all planes of the tiles before `end` with a block of output channels.
  void multiply(int64_t block, int64_t end) {
    const int64_t first = block * kOutputs;
    width_ = padded(smaller(kOutputs, shape_.out_channels - first));
    const float* panel = static_cast<const float*>(call_.panels) + kPlanes * sizes_.depth * first;
    for (int64_t plane = 0; plane < kPlanes; ++plane) {
      FASTDIFF_ISA::multiply<false, true>(inputs_ + plane * sizes_.inputs_plane, sizes_.pitch,
                                          panel + plane * sizes_.depth * width_, sizes_.depth, 0,
                                          products_ + plane * sizes_.products_plane, kOutputs, end,
                                          width_, sizes_.depth, false);
    }
  }

  // Gives the results the block's outputs of the band at `at`; returns where the next one is.
  template <bool FULL, typename Results>
  int64_t take(int64_t at, int64_t top, int64_t rows, const Results& results) {
    typename Results::Moments moments;
    for (int64_t row = 0; row < rows; row += M) {
      for (int64_t column = 0; column < sizes_.across; ++column, ++at) {
        for (int64_t v = 0; v < width_; v += kWidth) {
          transform_output(products_ + at * kOutputs + v, outputs_ + column * M * kOutputs + v);
        }
      }
      results.template take<FULL>(outputs_, sizes_.across * M, top + row, 0, sizes_.across * M * M,
                                  top + rows, moments);
    }
    return at;
  }

 private:
  static constexpr int N = M + 2;
  static constexpr int64_t kPlanes = N * N;
  // Planes a power of two apart would meet in a few sets of the caches.
  static constexpr int64_t kApart = 16;

  static int64_t across_of(const ConvolutionShape& s) { return ceil_div(s.out_width, M); }
  static int64_t depth_of(int64_t channels) { return ceil_div(channels, As::kLine) * As::kLine; }
  static int64_t pitch_of(const ConvolutionShape& s) {
    return depth_of(s.channels + s.second_channels) + kApart;
  }
  // With whole tiles, so that what the last ones read beyond the image is zero.
  static ConvolutionShape tiled(ConvolutionShape s) {
    s.out_width = across_of(s) * M;
    return s;
  }

  struct Sizes {
    Geometry geometry;
    int64_t across;  // tiles of a row
    int64_t depth;   // input channels, whole lines
    int64_t pitch;   // floats from tile to tile of inputs
    int64_t inputs_plane, products_plane, line, outputs;

    Sizes(const ConvolutionShape& s, int64_t band_rows, int64_t group)
        : geometry(tiled(s), band_rows),
          across(across_of(s)),
          depth(depth_of(s.channels + s.second_channels)),
          pitch(pitch_of(s)) {
      const int64_t tiles = group * ceil_div(band_rows, M) * across;
      inputs_plane = tiles * pitch;
      products_plane = tiles * kOutputs + kApart;
      line = geometry.places * As::kLine;
      outputs = across * M * M * kOutputs;
    }
    int64_t floats() const { return line + kPlanes * (inputs_plane + products_plane) + outputs; }
  };

  FASTDIFF_MEMBER void transform_input(const float* from, float* to) const {
    Vec half[N][N], part[N];
    for (int j = 0; j < N; ++j) {
      Vec column[N];
      for (int i = 0; i < N; ++i)
        column[i] = load(from + (i * sizes_.geometry.pitch + j) * As::kLine);
      Points<M>::input(column, part);
      for (int i = 0; i < N; ++i) half[i][j] = part[i];
    }
    for (int i = 0; i < N; ++i) {
      Points<M>::input(half[i], part);
      for (int j = 0; j < N; ++j) store(to + (i * N + j) * sizes_.inputs_plane, part[j]);
    }
  }

  FASTDIFF_MEMBER void transform_output(const float* from, float* to) const {
    Vec half[M][N], part[M];
    for (int j = 0; j < N; ++j) {
      Vec column[N];
      for (int i = 0; i < N; ++i) column[i] = load(from + (i * N + j) * sizes_.products_plane);
      Points<M>::output(column, part);
      for (int i = 0; i < M; ++i) half[i][j] = part[i];
    }
    for (int i = 0; i < M; ++i) {
      Points<M>::output(half[i], part);
      for (int j = 0; j < M; ++j) store(to + (i * sizes_.across * M + j) * kOutputs, part[j]);
    }
  }

  const ConvolutionShape& shape_;
  const ConvolutionCall& call_;
  const Sizes sizes_;
  float* const line_;      // a band's filled input, sixteen channels
  float* const inputs_;    // (planes, tiles, pitch)
  float* const products_;  // (planes, tiles, kOutputs), and kApart behind each plane
  float* const outputs_;   // a row of tiles: (M, across·M, kOutputs)
  int64_t width_ = 0;      // of the block that was multiplied
};

}  // namespace fastdiff::cpu::FASTDIFF_ISA

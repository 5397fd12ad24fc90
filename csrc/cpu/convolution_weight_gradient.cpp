// A convolution's weight gradient, and its bias's.
//
//   dW[k, c, tap] = Σ dy[k, place] · x[c, place·stride + tap]     over places and samples
//   db[k] = Σ dy[k, place]
//
// x, dy dense (samples, height, width, channels) in one dtype; dW in float32 by strides. The floor is
// the products: at 8 samples of 32×32, 128 channels and 3×3, 2.4 GFLOP on 4 MB of x and of dy each.
//
// x stands in scratch memory as for the convolution itself (convolution_geometry.h), and dy on the
// same grid of places, zeros between the rows: every tap is then a product of two matrices with one
// of them shifted. Bands of rows are filled in groups that the caches hold; then each thread takes
// blocks of output and input channels, all taps of a run of places while these are in L1. A block's
// sums over places are in one order, and bands follow from the shape alone: the number of threads
// changes no bit.
#include "convolution_weight_gradient.h"

#include "convolution_sums.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t kBandPlaces = 600;  // of a band: x of that many is in the L2 from line to line
constexpr int64_t kGroupBytes = 8ll
                                << 20;  // of the bands that are filled before they are multiplied
constexpr int64_t kRunSteps = 8;        // whose x and dy stay in L1 from tap to tap

int64_t band_rows_of(const ConvolutionShape& s) {
  const int64_t places = Geometry(s, 1).pitch * s.out_height;
  return ceil_div(s.out_height, ceil_div(places, kBandPlaces));
}

// How the work is cut, and where things stand in scratch memory. Lines are of 16 channels.
template <typename Sums>
struct Layout {
  static constexpr int64_t kSide = Sums::kLines * 16;  // channels of a block

  const Geometry geometry;
  int64_t bands;                               // of a sample
  int64_t units;                               // bands of all samples
  int64_t steps;                               // of a band: kStep places each
  int64_t x_lines, dy_lines, x_line, dy_line;  // how many, and the bytes of one
  int64_t x_image, dy_image;                   // bytes to the smaller pieces of split values
  int64_t band_bytes;
  int64_t group, groups;  // units of a group
  int64_t x_blocks, blocks, block_floats;

  explicit Layout(const ConvolutionShape& s) : geometry(s, band_rows_of(s)) {
    bands = ceil_div(s.out_height, geometry.band);
    units = s.samples * bands;
    steps = ceil_div(geometry.outputs(geometry.band), kStep);
    x_blocks = ceil_div(s.channels, kSide);
    blocks = x_blocks * ceil_div(s.out_channels, kSide);
    x_lines = x_blocks * Sums::kLines;
    dy_lines = blocks / x_blocks * Sums::kLines;
    x_line = (geometry.places + 1) * kLineBytes;  // a place writes to the one before it
    dy_line = steps * Sums::kStepBytes;
    x_image = x_lines * x_line;
    dy_image = dy_lines * dy_line;
    band_bytes = (x_image + dy_image) * Sums::As::kImages;
    group = larger(1, smaller(units, kGroupBytes / band_bytes));
    groups = ceil_div(units, group);
    block_floats = geometry.taps * kSide * kSide;
  }
};

// Sixteen channels of dy in rows [top, top + rows) of one sample, and their sum.
template <typename T, typename Sums>
void fill_gradient(char* to, const Layout<Sums>& layout, const ConvolutionShape& s, const T* from,
                   int64_t rows, int64_t channels, float* sum) {
  constexpr int kParts = 16 / kWidth;
  int in_part[kParts];
  for (int i = 0; i < kParts; ++i) {
    in_part[i] = static_cast<int>(larger(0, smaller(kWidth, channels - i * kWidth)));
  }
  Vec sums[kParts] = {};
  int64_t row = 0, column = 0;
  for (int64_t step = 0; step < layout.steps; ++step) {
    Vec values[kStep * kParts];
    for (int64_t place = 0; place < kStep; ++place) {
      const bool there = column < s.out_width && row < rows;
      const T* at = from + (row * s.out_width + column) * s.out_channels;
      for (int i = 0; i < kParts; ++i) {
        const Vec v = there ? load_n(at + i * kWidth, in_part[i]) : Vec{};
        values[place * kParts + i] = v;
        sums[i] = sums[i] + v;
      }
      if (++column == layout.geometry.pitch) {
        column = 0;
        ++row;
      }
    }
    Sums::put(to + step * Sums::kStepBytes, layout.dy_image, values);
  }
  for (int i = 0; i < kParts; ++i) store(sum + i * kWidth, sums[i]);
}

// One line of x or of dy of a unit.
template <typename T, typename Sums>
void fill_line(char* to, const Layout<Sums>& layout, const ConvolutionShape& s,
               const ConvolutionWeightGradientCall& call, int64_t unit, int64_t line,
               float* bias_sums) {
  const int64_t sample = unit / layout.bands, top = unit % layout.bands * layout.geometry.band;
  const int64_t rows = smaller(layout.geometry.band, s.out_height - top);
  if (line < layout.x_lines) {
    ConvolutionCall of_x = {};
    of_x.x = call.x;
    fill<T, typename Sums::As>(to + line * layout.x_line + kLineBytes, layout.x_image,
                               layout.geometry, s, of_x, sample, line * 16, top, rows);
    return;
  }
  line -= layout.x_lines;
  const int64_t k = line * 16, first_row = sample * s.out_height + top;
  fill_gradient<T, Sums>(
      to + layout.x_image * Sums::As::kImages + line * layout.dy_line, layout, s,
      static_cast<const T*>(call.dy) + first_row * s.out_width * s.out_channels + k, rows,
      larger(0, s.out_channels - k), bias_sums + (unit * layout.dy_lines + line) * 16);
}

// Taps [first, last) of a block, of one filled band.
template <typename Sums>
void add_band(const char* band, const Layout<Sums>& layout, int64_t block, int first, int last,
              float* sums) {
  const int64_t k = block / layout.x_blocks * Sums::kLines;
  const int64_t c = block % layout.x_blocks * Sums::kLines;
  const char* x = band + c * layout.x_line + kLineBytes;
  const char* dy = band + layout.x_image * Sums::As::kImages + k * layout.dy_line;
  for (int64_t step = 0; step < layout.steps; step += kRunSteps) {
    const int64_t steps = smaller(kRunSteps, layout.steps - step);
    for (int tap = first; tap < last; ++tap) {
      const Factors factors = {dy + step * Sums::kStepBytes,
                               layout.dy_line,
                               layout.dy_image,
                               x + (layout.geometry.offset[tap] + step * kStep) * kLineBytes,
                               layout.x_line,
                               layout.x_image};
      Sums::add(factors, steps, sums + tap * Layout<Sums>::kSide * Layout<Sums>::kSide);
    }
  }
}

// A block's sums of one tap, squares of 16×16, to where they belong.
template <typename Sums>
void write_tap(const float* sums, const Layout<Sums>& layout, const ConvolutionShape& s,
               const ConvolutionWeightGradientCall& call, int64_t block, int tap) {
  for (int64_t square = 0; square < Sums::kLines * Sums::kLines; ++square) {
    const int64_t k = (block / layout.x_blocks * Sums::kLines + square / Sums::kLines) * 16;
    const int64_t c = (block % layout.x_blocks * Sums::kLines + square % Sums::kLines) * 16;
    const int64_t columns = larger(0, smaller(16, s.channels - c));
    for (int64_t row = 0; row < smaller(16, s.out_channels - k); ++row) {
      const float* from = sums + (square * 16 + row) * 16;
      float* to =
          call.dw + (k + row) * call.out_stride + c * call.channel_stride + tap * call.tap_stride;
      for (int64_t column = 0; column < columns; ++column) {
        to[column * call.channel_stride] = from[column];
      }
    }
  }
}

template <typename T, typename Sums>
int64_t run(const ConvolutionShape& s, const ConvolutionWeightGradientCall& call, float* workspace,
            int threads) {
  constexpr int64_t kLineFloats = kLineBytes / 4;
  const Layout<Sums> layout(s);
  const int64_t scratch_floats = layout.group * layout.band_bytes / 4;
  const int64_t bias_floats = layout.units * layout.dy_lines * 16;
  // Few blocks are shared out by taps too.
  const int taps = layout.geometry.taps;
  const int64_t shares = smaller(taps, ceil_div(threads, layout.blocks));
  const int64_t tasks = layout.blocks * shares;
  const int team = static_cast<int>(smaller(threads, tasks));
  const int64_t sums_of = layout.groups == 1 ? team : layout.blocks;
  const int64_t needed = kLineFloats + scratch_floats + bias_floats + sums_of * layout.block_floats;
  if (workspace == nullptr) return needed;
  float* const scratch = reinterpret_cast<float*>(
      ceil_div(reinterpret_cast<intptr_t>(workspace), kLineBytes) * kLineBytes);
  float* const bias_sums = scratch + scratch_floats;
  float* const all_sums = bias_sums + bias_floats;
  const auto band = [&](int64_t unit) {
    return reinterpret_cast<char*>(scratch) + unit % layout.group * layout.band_bytes;
  };

#pragma omp parallel num_threads(team) if (team > 1)
  {
    Sums::begin();
    const int64_t lines = layout.x_lines + layout.dy_lines;
    for (int64_t first = 0; first < layout.units; first += layout.group) {
      const int64_t last = smaller(first + layout.group, layout.units);
      for (int64_t line = first * lines + thread_index(); line < last * lines;
           line += thread_count()) {
        fill_line<T, Sums>(band(line / lines), layout, s, call, line / lines, line % lines,
                           bias_sums);
      }
#pragma omp barrier
      for (int64_t task = thread_index(); task < tasks; task += thread_count()) {
        const int64_t block = task / shares, share = task % shares;
        const int from = static_cast<int>(taps * share / shares);
        const int to = static_cast<int>(taps * (share + 1) / shares);
        float* const sums =
            all_sums + (layout.groups == 1 ? thread_index() : block) * layout.block_floats;
        constexpr int64_t kTapFloats = Layout<Sums>::kSide * Layout<Sums>::kSide;
        if (first == 0) memset(sums + from * kTapFloats, 0, (to - from) * kTapFloats * 4);
        for (int64_t unit = first; unit < last; ++unit) {
          add_band<Sums>(band(unit), layout, block, from, to, sums);
        }
        for (int tap = from; tap < to && last == layout.units; ++tap) {
          write_tap<Sums>(sums + tap * kTapFloats, layout, s, call, block, tap);
        }
      }
#pragma omp barrier
    }
    Sums::end();
  }
  for (int64_t k = 0; call.db != nullptr && k < s.out_channels; ++k) {
    float sum = 0.0f;
    for (int64_t unit = 0; unit < layout.units; ++unit) {
      sum += bias_sums[unit * layout.dy_lines * 16 + k];
    }
    call.db[k] = sum;
  }
  return needed;
}

template <typename Sums>
int64_t run(const ConvolutionShape& s, const ConvolutionWeightGradientCall& call, float* workspace,
            int threads) {
  switch (s.dtype) {
    case DType::kFloat32:
      return run<float, Sums>(s, call, workspace, threads);
    case DType::kBFloat16:
      return run<BFloat16, Sums>(s, call, workspace, threads);
    case DType::kFloat16:
      return run<Float16, Sums>(s, call, workspace, threads);
  }
  return 0;
}

}  // namespace

int64_t convolution_weight_gradient(const ConvolutionShape& shape,
                                    const ConvolutionWeightGradientCall& call, float* workspace,
                                    int threads) {
#if defined(FASTDIFF_AMX)
  if (shape.products == Products::kBFloat16)
    return run<TileSums<false>>(shape, call, workspace, threads);
  if (shape.products == Products::kSplit)
    return run<TileSums<true>>(shape, call, workspace, threads);
#endif
#if defined(FASTDIFF_PAIRS)
  if (shape.products == Products::kPairs) return run<PairSums>(shape, call, workspace, threads);
#endif
  return run<Float32Sums>(shape, call, workspace, threads);
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

// A convolution as products of shifted input: every tap of the kernel times a block of outputs.
//
// A thread's scratch holds its bands' filled input, which each block of output channels reads again.
// Where that were a copy of x, a kernel of one reads x itself.
#pragma once

#include "convolution_products.h"
#include "convolution_results.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

template <typename Multiplier>
class TapBands {
 public:
  using As = typename Multiplier::As;
  static constexpr int64_t kOutputs = Multiplier::kOutputs;
  static constexpr int64_t kRows = 1;                // output rows that belong together
  static constexpr int64_t kFewOutputs = 192;        // of a thread
  static constexpr int64_t kCacheBytes = 384 << 10;  // leaves the L2 room for weights

  // What stays in the cache for a band of so many rows.
  static int64_t band_bytes(const ConvolutionShape& s, int64_t rows) {
    return Geometry(undoubled(s), rows).places * lines_of(s) * kLineBytes * As::kImages;
  }

  // Floats of scratch that a thread needs for `group` bands.
  static int64_t scratch(const ConvolutionShape& s, int64_t rows, int64_t group) {
    return group * band_bytes(s, rows) / 4;
  }

  static int64_t panel_bytes(int64_t out_channels, int64_t channels, int64_t taps) {
    return ceil_div(out_channels, kOutputs) * ceil_div(channels, As::kLine) * taps *
           Multiplier::kTapBytes;
  }

  // One line of input channels for one block of output channels.
  static void pack(char* panels, const Weights<float>& weights, int64_t block, int64_t line) {
    const int64_t lines = ceil_div(weights.channels, As::kLine);
    char* to = panels + (block * lines + line) * weights.taps * Multiplier::kTapBytes;
    for (int64_t tap = 0; tap < weights.taps; ++tap) {
      Multiplier::pack(to + tap * Multiplier::kTapBytes, weights, block * kOutputs,
                       line * As::kLine, tap);
    }
  }

  TapBands(const ConvolutionShape& shape, const ConvolutionCall& call, int64_t band_rows, int64_t,
           float* scratch)
      : shape_(undoubled(shape)),
        call_(call),
        geometry_(shape_, band_rows),
        scratch_(reinterpret_cast<char*>(scratch)),
        from_(scratch_),
        band_places_(band_bytes(shape, band_rows) / kLineBytes),
        blocks_(ceil_div(shape.out_channels, kOutputs)) {
    left_.lines = lines_ = lines_of(shape);
    left_.line = geometry_.places * kLineBytes;
    left_.image = left_.line * left_.lines;
    left_.taps = rest_.taps = choose_taps(shape);
    if (may_read_x(band_rows)) read_x();
  }
  ~TapBands() {
    if (begun_ >= 0) multiplier_.end();
  }
  TapBands(const TapBands&) = delete;
  TapBands& operator=(const TapBands&) = delete;

  // Output rows [top, top + rows) of a sample as the band at `at`; returns where the next one is.
  template <typename T>
  int64_t fill(int64_t at, int64_t sample, int64_t top, int64_t rows) {
    if (reads_x_) {
      if (at == 0) first_ = (sample * shape_.height + top) * shape_.width;
      return at + places_of(rows);
    }
    for (int64_t c = 0; c < lines_ * As::kLine; c += 16) {
      char* to = scratch_ + at * kLineBytes + c / As::kLine * left_.line +
                 c % As::kLine * (kLineBytes / As::kLine);
      FASTDIFF_ISA::fill<T, As>(to, left_.image, geometry_, shape_, call_, sample, c, top, rows);
    }
    return at + places_of(rows);
  }

  // The block that is taken next, from bands up to `end`.
  void multiply(int64_t block, int64_t) {
    panel_ = static_cast<const char*>(call_.panels) +
             block * lines_ * left_.taps * Multiplier::kTapBytes;
    left_.offset = rest_.offset = offsets_[block / blocks_];
  }

  // Gives the results the block's outputs of the band at `at`; returns where the next one is.
  template <bool FULL, typename Results>
  int64_t take(int64_t at, int64_t top, int64_t rows, const Results& results) {
    const int64_t outputs = geometry_.outputs(rows);
    if (begun_ != outputs) multiplier_.begin(outputs);
    begun_ = outputs;
    alignas(64) float products[Multiplier::kPositions * Multiplier::kOutputs];
    typename Results::Moments moments;
    const int64_t step = multiplier_.positions(outputs);
    for (int64_t place = 0; place < outputs; place += step) {
      const int64_t count = smaller(step, outputs - place);
      left_.places = from_ + (first_ + at + place) * left_.place;
      if (left_.then != nullptr) rest_.places = second_ + (first_ + at + place) * rest_.place;
      multiplier_.multiply(left_, panel_, count, products);
      results.template take<FULL>(products, geometry_.pitch, top + place / geometry_.pitch,
                                  place % geometry_.pitch, count, top + rows, moments);
    }
    return at + places_of(rows);
  }

 private:
  static int64_t lines_of(const ConvolutionShape& s) {
    return ceil_div(s.channels + s.second_channels, As::kLine);
  }

  // Which of the taps of the input that stands in scratch each part has; answers how many.
  int64_t choose_taps(const ConvolutionShape& s) {
    const int64_t down = s.folded ? (s.kernel_height + 1) / 2 : s.kernel_height;
    const int64_t across = s.folded ? (s.kernel_width + 1) / 2 : s.kernel_width;
    for (int64_t part = 0; part < parts_of(s); ++part) {
      const int64_t row = s.padding % 2 * (part / 2), column = s.padding % 2 * (part % 2);
      for (int64_t i = 0; i < down; ++i) {
        for (int64_t j = 0; j < across; ++j) {
          offsets_[part][i * across + j] =
              geometry_.offset[(row + i) * shape_.kernel_width + column + j];
        }
      }
    }
    return down * across;
  }

  // Whether scratch would hold a copy of x. Tiles must then end with a band: behind it x may end.
  bool may_read_x(int64_t band_rows) const {
    const ConvolutionShape& s = shape_;
    const auto fits = [&](int64_t rows) {
      const int64_t outputs = geometry_.outputs(rows);
      return outputs % ceil_div(outputs, 16) == 0;
    };
    const int64_t last_rows = s.out_height - (s.out_height - 1) / band_rows * band_rows;
    return Multiplier::kReadsX && s.dtype == DType::kBFloat16 && geometry_.taps == 1 &&
           s.stride == 1 && s.padding == 0 && s.out_height == s.height && s.out_width == s.width &&
           !s.upsample && !s.silu && call_.coefficients == nullptr && s.channels % As::kLine == 0 &&
           s.second_channels % As::kLine == 0 && fits(band_rows) && fits(last_rows);
  }
  void read_x() {
    const auto lines_of_source = [](Left& left, int64_t channels) {
      left.place = channels * sizeof(BFloat16);
      left.line = kLineBytes;
      left.lines = channels / As::kLine;
    };
    lines_of_source(left_, shape_.channels);
    lines_of_source(rest_, shape_.second_channels);
    if (call_.second != nullptr) left_.then = &rest_;
    from_ = static_cast<const char*>(call_.x);
    second_ = static_cast<const char*>(call_.second);
    reads_x_ = true;
  }

  // From a band to the next one.
  int64_t places_of(int64_t rows) const {
    return reads_x_ ? geometry_.outputs(rows) : band_places_;
  }

  const ConvolutionShape shape_;  // of the input that stands in scratch
  const ConvolutionCall& call_;
  const Geometry geometry_;
  char* const scratch_;
  const char* from_;  // scratch, or x
  const char* second_ = nullptr;
  bool reads_x_ = false;
  int64_t first_ = 0;          // place of x, of the first band
  const int64_t band_places_;  // 64 bytes each, all lines
  const int64_t blocks_;       // of a part
  int64_t offsets_[4][kMostTaps];
  int64_t lines_;
  Left left_, rest_;
  Multiplier multiplier_;
  int64_t begun_ = -1;  // outputs of a band that the multiplier is ready for
  const char* panel_ = nullptr;
};

}  // namespace fastdiff::cpu::FASTDIFF_ISA

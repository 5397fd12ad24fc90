// attention's products in AMX's tiles, of bfloat16 or of values in two bfloat16 pieces.
//
// q and P stand in lines of 32 (channels, or keys) as a convolution's input does, k and v as its
// weight: a block of 32 keys or channels at a time.
#pragma once

#include "attention_pieces.h"
#include "convolution_products.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

#if defined(FASTDIFF_AMX)
template <typename T, bool SPLIT>
class TileFactors {
  using Tiles = TileProducts<SPLIT>;
  using As = typename Tiles::As;
  static constexpr int64_t kLine = As::kLine;
  static_assert(kLine == Tiles::kOutputs && kRows % kLine == 0 && kKeys % kLine == 0);

 public:
  using Element = T;
  static constexpr int64_t kColumns = kLine;

  static int64_t head_floats(const Attention& p, const Cut& cut) {
    return 2 * panel_floats(p.tokens, cut.width);
  }
  static int64_t block_floats(const Attention& p, const Cut& cut) {
    return cut.rows * cut.width +
           (image_bytes(cut, cut.width) + image_bytes(cut, smaller(kKeys, p.tokens))) *
               As::kImages / 4;
  }

  // Tokens [first, last) of a head's k and v.
  static void pack(const Attention& p, const Cut& cut, int64_t head, int64_t first, int64_t last,
                   float* to) {
    const Part<const T> k = factor_of<const T>(p, p.qkv, head, kK);
    const Part<const T> v = factor_of<const T>(p, p.qkv, head, kV);
    const Weights<T> by_token = {
        k.data, p.tokens, p.head_dim, 1, k.token_stride, k.channel_stride, 0};
    const Weights<T> by_channel = {
        v.data, p.head_dim, p.tokens, 1, v.channel_stride, v.token_stride, 0};
    const int64_t lines = cut.width / kLine, token_lines = ceil_div(p.tokens, kLine);
    char* const k_panels = reinterpret_cast<char*>(to);
    char* const v_panels = reinterpret_cast<char*>(to + panel_floats(p.tokens, cut.width));
    for (int64_t token = first; token < last; token += kLine) {
      for (int64_t line = 0; line < lines; ++line) {
        const int64_t of_k = token / kLine * lines + line, of_v = line * token_lines + token / kLine;
        Tiles::pack(k_panels + of_k * Tiles::kTapBytes, by_token, token, line * kLine, 0);
        Tiles::pack(v_panels + of_v * Tiles::kTapBytes, by_channel, line * kLine, token, 0);
      }
    }
  }

  TileFactors(const Attention& p, const Cut& cut, const float* packed, float* scores,
              float* scratch)
      : p_(p),
        cut_(cut),
        k_(reinterpret_cast<const char*>(packed)),
        v_(reinterpret_cast<const char*>(packed + panel_floats(p.tokens, cut.width))),
        scores_(scores),
        wide_(scratch),
        q_{reinterpret_cast<char*>(scratch + cut.rows * cut.width), image_bytes(cut, cut.width)},
        probabilities_{q_.at + q_.image * As::kImages,
                       image_bytes(cut, smaller(kKeys, p.tokens))} {}
  ~TileFactors() { tiles_.end(); }
  TileFactors(const TileFactors&) = delete;
  TileFactors& operator=(const TileFactors&) = delete;

  FASTDIFF_MEMBER void take_queries(const Part<const T>& q, int64_t first, int64_t rows) {
    rows_ = rows;
    tiles_.begin(rows);
    if (q.channel_stride == 1) {
      fill_queries(q.data + first * q.token_stride, q.token_stride);
    } else {
      const Rows wide = rows_of(q, first, rows, p_.head_dim, wide_, cut_.width);
      fill_queries(wide.data, wide.stride);
    }
  }
  FASTDIFF_MEMBER void score(int64_t key, int64_t keys) const {
    for (int64_t j = 0; j < keys; j += kLine) {
      const char* panel = k_ + (key + j) / kLine * (cut_.width / kLine) * Tiles::kTapBytes;
      multiply(q_, cut_.width, panel, scores_ + j, cut_.score_stride, false);
    }
    for (int64_t i = 0; i < rows_ && keys % kLine != 0; ++i) {  // a line that P does not fill
      const int64_t last = keys / kLine * kLine;
      for (int64_t j = last; j < last + kLine; j += kWidth) put(i, j, Vec{});
    }
  }
  FASTDIFF_MEMBER void put(int64_t row, int64_t key, Vec probabilities) const {
    probabilities_.put(cut_.rows, row, key, probabilities);
  }
  FASTDIFF_MEMBER void add_values(int64_t key, int64_t keys, float* out) const {
    const int64_t depth = ceil_div(p_.tokens, kLine);
    for (int64_t c = 0; c < cut_.width; c += kLine) {
      const char* panel = v_ + (c / kLine * depth + key / kLine) * Tiles::kTapBytes;
      multiply(probabilities_, keys, panel, out + c, cut_.width, key > 0);
    }
  }

 private:
  // A left factor: lines of cut.rows rows, and `image` bytes on the smaller pieces.
  struct Lines {
    char* at;
    int64_t image;

    FASTDIFF_MEMBER void put(int64_t rows, int64_t row, int64_t column, Vec v) const {
      As::put(at + (column / kLine * rows + row) * kLineBytes + column % kLine * 2, image, &v);
    }
  };

  static int64_t image_bytes(const Cut& cut, int64_t depth) {
    return ceil_div(depth, kLine) * cut.rows * kLineBytes;
  }
  static int64_t panel_floats(int64_t tokens, int64_t width) {
    return ceil_div(tokens, kLine) * (width / kLine) * (Tiles::kTapBytes / 4);
  }

  template <typename U>
  FASTDIFF_MEMBER void fill_queries(const U* from, int64_t stride) const {
    for (int64_t i = 0; i < rows_; ++i, from += stride) {
      for (int64_t c = 0; c < cut_.width; c += kWidth) {
        const int there = static_cast<int>(larger(0, smaller(kWidth, p_.head_dim - c)));
        q_.put(cut_.rows, i, c, load_n(from + c, there));
      }
    }
  }

  // `depth` of the left factor's columns times a panel, to 32 columns.
  FASTDIFF_MEMBER void multiply(const Lines& lines, int64_t depth, const char* panel, float* to,
                                int64_t pitch, bool more) const {
    static constexpr int64_t kNoShift = 0;
    Left left = {lines.at, cut_.rows * kLineBytes, lines.image, ceil_div(depth, kLine), 1,
                 &kNoShift};
    const int64_t step = tiles_.positions(rows_);
    for (int64_t i = 0; i < rows_; i += step) {
      tiles_.multiply(left, panel, smaller(step, rows_ - i), to + i * pitch, pitch, more);
      left.places += step * kLineBytes;
    }
  }

  const Attention& p_;
  const Cut& cut_;
  const char *k_, *v_;
  float *scores_, *wide_;
  Lines q_, probabilities_;
  Tiles tiles_;
  int64_t rows_ = 0;
};
#endif

}  // namespace fastdiff::cpu::FASTDIFF_ISA

// What becomes of a block of products: the additions, the result in memory, its moments.
#pragma once

#include "threads.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

// The mean and the sum of squared deviations of values that come one by one, from sums of their
// distances to the first: what cancels is no more than a first value can be off the mean.
template <int VECTORS>
struct RunningMoments {
  Vec first[VECTORS], sum[VECTORS], squares[VECTORS];
  int64_t count = 0;

  FASTDIFF_MEMBER void start(const Vec* values) {
    for (int j = 0; j < VECTORS; ++j) {
      first[j] = values[j];
      sum[j] = squares[j] = Vec{};
    }
  }
  FASTDIFF_MEMBER void add(const Vec* values) {
    for (int j = 0; j < VECTORS; ++j) {
      const Vec d = values[j] - first[j];
      sum[j] = sum[j] + d;
      squares[j] = fma(d, d, squares[j]);
    }
  }
  // (2, stride) at `to`: mean, Σ (x − mean)².
  FASTDIFF_MEMBER void finish(float* to, int64_t stride) {
    for (int j = 0; j < VECTORS; ++j) {
      const Vec offset = sum[j] / splat(static_cast<float>(count));
      store(to + j * kWidth, first[j] + offset);
      const Vec rest = squares[j] - offset * sum[j];
      store(to + stride + j * kWidth, rest < Vec{} ? Vec{} : rest);
    }
    count = 0;
  }
};

// Results of one sample and one block of output channels, whose places come in order: all of them, or
// those that are every other one each way.
template <typename T, int VECTORS>
struct Results {
  using Moments = RunningMoments<VECTORS>;

  int64_t rows;          // of outputs
  int64_t width;         // of a row
  int64_t row_stride;    // elements
  int64_t place_stride;  // likewise
  int channels;          // of the block's that there are
  const float* bias;     // of the block's channels, or null, as all below
  const float* add;      // of the sample, too
  const T* residual;     // of the sample's first place
  T* y;                  // likewise
  float* strips;         // (strips, 2, strips_stride): moments of `strip_rows` output rows each
  int64_t strips_stride;
  int64_t strip_rows;

  // products: rows of VECTORS registers, of `count` places from the `column`-th of output row `row`
  // on, which lie in `last - row` rows at most; a row has `pitch` places, of which the first are
  // outputs.
  template <bool FULL>
  void take(const float* products, int64_t pitch, int64_t row, int64_t column, int64_t count,
            int64_t last, Moments& moments) const {
    Vec added[VECTORS] = {};
    int in_part[VECTORS];
    for (int j = 0; j < VECTORS; ++j) {
      in_part[j] = static_cast<int>(larger(0, smaller(kWidth, channels - j * kWidth)));
      if (bias != nullptr) added[j] = get<FULL>(bias + j * kWidth, in_part[j]);
      if (add != nullptr) added[j] = added[j] + get<FULL>(add + j * kWidth, in_part[j]);
    }
    last = smaller(last, rows);
    while (count > 0 && row < last) {
      const int64_t here = larger(0, smaller(count, width - column));
      const int64_t first = row * row_stride + column * place_stride;
      for (int64_t i = 0; i < here; ++i) {
        Vec values[VECTORS];
        const int64_t at = first + i * place_stride;
        for (int j = 0; j < VECTORS; ++j) {
          values[j] = load(products + (i * VECTORS + j) * kWidth) + added[j];
          if (residual != nullptr) {
            values[j] = values[j] + get<FULL>(residual + at + j * kWidth, in_part[j]);
          }
          put<FULL>(y + at + j * kWidth, values[j], in_part[j]);
        }
        if (strips == nullptr) continue;
        if (moments.count == 0) moments.start(values);
        moments.add(values);
        ++moments.count;
      }
      const int64_t passed = smaller(count, pitch - column);
      products += passed * VECTORS * kWidth;
      count -= passed;
      column += passed;
      if (strips != nullptr && column >= width && moments.count > 0 &&
          ((row + 1) % strip_rows == 0 || row + 1 == last)) {
        moments.finish(strips + row / strip_rows * 2 * strips_stride, strips_stride);
      }
      if (column < pitch) continue;
      column = 0;
      ++row;
    }
  }

 private:
  template <bool FULL, typename U>
  FASTDIFF_MEMBER static Vec get(const U* from, int count) {
    return FULL ? load(from) : load_n(from, count);
  }
  template <bool FULL>
  FASTDIFF_MEMBER static void put(T* to, Vec value, int count) {
    if (FULL) {
      store(to, value);
    } else {
      store_n(to, value, count);
    }
  }
};

}  // namespace fastdiff::cpu::FASTDIFF_ISA

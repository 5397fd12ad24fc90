// group_norm_silu, backward, for planar tensors (NCHW and its 1-D and 3-D kin).
#pragma once

#include "group_norm_backward.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

constexpr int64_t kPiece = 65536;         // positions of a channel that threads share out
constexpr int64_t kKeptElements = 65536;  // dv of a group, 256 KiB

template <typename T, bool kResidual, bool kSilu>
struct PlanarBackward : Backward<T, kResidual, kSilu> {
  using Base = Backward<T, kResidual, kSilu>;
  using Base::call, Base::coefficients, Base::shape, Base::sums;
  int64_t pieces = ceil_div(shape.positions, kPiece);

  // Room for a group's dv, where it is small enough to stay in a core's own cache.
  FASTDIFF_MEMBER int64_t kept_elements() const {
    const int64_t run = this->width * shape.positions;
    return sizeof(T) == sizeof(float) || run > kKeptElements ? 0 : run;
  }
  FASTDIFF_MEMBER int64_t scratch_elements() const {
    return 3 * this->row + padded(kept_elements());
  }

  // `item` counts the groups of all samples, c the channels of one sample.
  FASTDIFF_MEMBER Channel channel_of(int64_t sample, int64_t item, int64_t c) const {
    const float* embedding = coefficients.embedding_of(sample);
    const float add = embedding == nullptr ? 0.0f : embedding[c];
    return {splat(call.mean[item] - add), splat(call.rstd[item]),
            splat(coefficients.gain_of(sample)[c]), splat(coefficients.offset_of(sample)[c])};
  }

  FASTDIFF_MEMBER float* sums_of(int which, int64_t sample, int64_t c, int64_t piece) const {
    const int64_t stride = shape.samples * shape.channels * pieces;
    return sums + which * stride + (sample * shape.channels + c) * pieces + piece;
  }

  // With kKeep, dv of the channel's positions goes to `kept`.
  template <bool kKeep>
  FASTDIFF_MEMBER void add_up(int64_t sample, int64_t item, int64_t c, int64_t piece,
                              float* kept) const {
    const int64_t offset = (sample * shape.channels + c) * shape.positions;
    const T* x = this->x_at(offset);
    const T* dy = this->dy_at(offset);
    const T* residual = this->residual_at(offset);
    const Channel channel = channel_of(sample, item, c);
    const int64_t end = smaller((piece + 1) * kPiece, shape.positions);
    Sums to;
    int64_t i = piece * kPiece;
    for (; i + kWidth <= end; i += kWidth) {
      const Vec v = this->x_of(x, residual, i);
      const Vec dv = Base::accumulate(to, load(dy + i), v, channel, splat(1.0f));
      if (kKeep) store(kept + i, dv);
    }
    if (i < end) {
      const int n = static_cast<int>(end - i);
      const Vec v = this->x_of_n(x, residual, i, n);
      const Vec dv = Base::accumulate(to, load_n(dy + i, n), v, channel, ones_n(n));
      if (kKeep) store_n(kept + i, dv, n);
    }
    *sums_of(0, sample, c, piece) = sum(to.dv);
    *sums_of(1, sample, c, piece) = sum(to.dv_xhat);
    *sums_of(2, sample, c, piece) = sum(to.xhat);
  }

  // A group's channels: pieces are added in order into the first of each.
  FASTDIFF_MEMBER void merge(int64_t sample, int64_t group, float* dv, float* dv_xhat,
                             float* xhat) const {
    for (int64_t c = 0; c < this->width; ++c) {
      float* to[3] = {dv + c, dv_xhat + c, xhat + c};
      for (int which = 0; which < 3; ++which) {
        double total = 0;
        for (int64_t piece = 0; piece < pieces; ++piece) {
          total += *sums_of(which, sample, group * this->width + c, piece);
        }
        *to[which] = static_cast<float>(total);
      }
    }
  }

  // With kKeep, dv is read from `kept`.
  template <bool kKeep>
  FASTDIFF_MEMBER void write(int64_t sample, int64_t item, int64_t c, int64_t piece, float level,
                             float slope, const float* kept) const {
    const int64_t offset = (sample * shape.channels + c) * shape.positions;
    const T* x = this->x_at(offset);
    const T* dy = this->dy_at(offset);
    const T* residual = this->residual_at(offset);
    T* dx = static_cast<T*>(call.dx) + offset;
    const Channel channel = channel_of(sample, item, c);
    const Gradient gradient = {channel.gain * channel.rstd, splat(level), splat(slope)};
    const int64_t end = smaller((piece + 1) * kPiece, shape.positions);
    int64_t i = piece * kPiece;
    for (; i + kWidth <= end; i += kWidth) {
      const Vec xhat = Base::xhat_of(this->x_of(x, residual, i), channel);
      const Vec dv = kKeep ? load(kept + i) : Base::dv_of(load(dy + i), xhat, channel);
      store(dx + i, Base::dx_of(dv, xhat, gradient));
    }
    if (i < end) {
      const int n = static_cast<int>(end - i);
      const Vec xhat = Base::xhat_of(this->x_of_n(x, residual, i, n), channel);
      const Vec dv = kKeep ? load_n(kept + i, n) : Base::dv_of(load_n(dy + i, n), xhat, channel);
      store_n(dx + i, Base::dx_of(dv, xhat, gradient), n);
    }
  }

  // Both passes over one group; what the first reads is still cached in the second. dv is kept in
  // dx itself where that is float32, else in `kept` where it fits.
  template <bool kKeep>
  FASTDIFF_MEMBER void run_group(int64_t item, float* rows, float* kept) const {
    const int64_t sample = item / shape.groups, group = item % shape.groups;
    const int64_t first = group * this->width, positions = shape.positions;
    if (sizeof(T) == sizeof(float)) {
      kept = static_cast<float*>(call.dx) + item * this->width * positions;
    }
    for (int64_t c = 0; c < this->width; ++c) {
      for (int64_t piece = 0; piece < pieces; ++piece) {
        add_up<kKeep>(sample, item, first + c, piece, kept + (kKeep ? c * positions : 0));
      }
    }
    float level, slope;
    float *dv = rows, *dv_xhat = rows + this->row, *xhat = rows + 2 * this->row;
    merge(sample, group, dv, dv_xhat, xhat);
    this->finish_group(sample, group, dv, dv_xhat, xhat, &level, &slope, true);
    for (int64_t c = 0; c < this->width; ++c) {
      for (int64_t piece = 0; piece < pieces; ++piece) {
        write<kKeep>(sample, item, first + c, piece, level, slope,
                     kept + (kKeep ? c * positions : 0));
      }
    }
  }
};

template <typename T, bool kResidual, bool kSilu>
void run_planar_backward(const PlanarBackward<T, kResidual, kSilu>& planar, float* scratch,
                         int team) {
  const GroupNormShape& shape = planar.shape;
  const int64_t items = shape.samples * shape.groups, row = planar.row;
  const int64_t pieces = planar.pieces, group_pieces = planar.width * pieces;
  const bool whole_groups = group_pieces == 1 || items >= 2 * team;
  const bool keeps = kSilu && (sizeof(T) == sizeof(float) || planar.kept_elements() > 0);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    float* rows = scratch + thread_index() * planar.scratch_elements();
    float* kept = rows + 3 * row;
    if (whole_groups && keeps) {
#pragma omp for schedule(static)
      for (int64_t item = 0; item < items; ++item)
        planar.template run_group<true>(item, rows, kept);
    } else if (whole_groups) {
#pragma omp for schedule(static)
      for (int64_t item = 0; item < items; ++item) {
        planar.template run_group<false>(item, rows, kept);
      }
    } else {
#pragma omp for schedule(static)
      for (int64_t p = 0; p < items * group_pieces; ++p) {
        const int64_t item = p / group_pieces, c = p / pieces % shape.channels;
        planar.template add_up<false>(item / shape.groups, item, c, p % pieces, nullptr);
      }
      int64_t merged = -1;
      float level = 0, slope = 0;
#pragma omp for schedule(static)
      for (int64_t p = 0; p < items * group_pieces; ++p) {
        const int64_t item = p / group_pieces, c = p / pieces % shape.channels;
        const int64_t sample = item / shape.groups, group = item % shape.groups;
        if (item != merged) {
          planar.merge(sample, group, rows, rows + row, rows + 2 * row);
          planar.finish_group(sample, group, rows, rows + row, rows + 2 * row, &level, &slope,
                              p % group_pieces == 0);
          merged = item;
        }
        planar.template write<false>(sample, item, c, p % pieces, level, slope, nullptr);
      }
    }
  }
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

// group_norm_silu, backward, for channels_last tensors.
#pragma once

#include "group_norm_backward.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

constexpr int64_t kBackwardBlockElements = 8192;  // a block of positions, all channels

template <typename T, bool kResidual, bool kSilu>
struct ChannelsLastBackward : Backward<T, kResidual, kSilu> {
  using Base = Backward<T, kResidual, kSilu>;
  using Base::call, Base::coefficients, Base::row, Base::shape, Base::sums;
  float* scratch;  // (team, 9, row)
  int64_t block =
      kBackwardBlockElements / shape.channels > 0 ? kBackwardBlockElements / shape.channels : 1;
  int64_t blocks = ceil_div(shape.positions, block);

  // This thread's rows for one sample.
  struct Rows {
    float *mean, *rstd, *gain, *offset, *dv, *dv_xhat, *xhat, *level, *slope;
  };

  FASTDIFF_MEMBER Rows rows() const {
    float* at = scratch + thread_index() * 9 * row;
    return {at,           at + row,     at + 2 * row, at + 3 * row, at + 4 * row,
            at + 5 * row, at + 6 * row, at + 7 * row, at + 8 * row};
  }

  FASTDIFF_MEMBER int64_t count_of(int64_t index) const {
    return smaller(block, shape.positions - index * block);
  }

  FASTDIFF_MEMBER void prepare(int64_t sample, Range channels, const Rows& to) const {
    const float* gain = coefficients.gain_of(sample);
    const float* offset = coefficients.offset_of(sample);
    const float* embedding = coefficients.embedding_of(sample);
    for (int64_t group = channels.first / this->width; group * this->width < channels.last;
         ++group) {
      const float mean = call.mean[sample * shape.groups + group];
      const float rstd = call.rstd[sample * shape.groups + group];
      for (int64_t c = group * this->width; c < (group + 1) * this->width; ++c) {
        to.mean[c] = embedding == nullptr ? mean : mean - embedding[c];
        to.rstd[c] = rstd;
      }
    }
    for (int64_t c = channels.first; c < channels.last; c += kWidth) {
      store(to.gain + c, load(gain + c));
      store(to.offset + c, load(offset + c));
    }
  }

  FASTDIFF_MEMBER static Channel channel_of(const Rows& rows, int64_t c) {
    return {load(rows.mean + c), load(rows.rstd + c), load(rows.gain + c), load(rows.offset + c)};
  }

  FASTDIFF_MEMBER float* part_of(int64_t sample, int64_t index) const {
    return sums + (sample * blocks + index) * 3 * row;
  }

  FASTDIFF_MEMBER void add_up(int64_t sample, int64_t index, Range range, const Rows& rows) const {
    const int64_t channels = shape.channels, count = count_of(index);
    const int64_t offset = (sample * shape.positions + index * block) * channels;
    const T* x = this->x_at(offset);
    const T* dy = this->dy_at(offset);
    const T* residual = this->residual_at(offset);
    T* dx = static_cast<T*>(call.dx) + offset;
    float* part = part_of(sample, index);
    int64_t c = range.first;
    for (; c + 2 * kWidth <= range.last; c += 2 * kWidth) {
      const Channel channel[2] = {channel_of(rows, c), channel_of(rows, c + kWidth)};
      Sums to[2];
      for (int64_t position = 0; position < count; ++position) {
        const int64_t at = position * channels + c;
        for (int u = 0; u < 2; ++u) {
          const int64_t i = at + u * kWidth;
          const Vec dv = this->accumulate(to[u], load(dy + i), this->x_of(x, residual, i),
                                          channel[u], splat(1.0f));
          if (Base::kKeepsDv) store(dx + i, dv);
        }
      }
      for (int u = 0; u < 2; ++u) keep(to[u], part + c + u * kWidth);
    }
    for (; c < range.last; c += kWidth) {
      const int n = static_cast<int>(smaller(range.last - c, kWidth));
      const Channel channel = channel_of(rows, c);
      Sums to;
      for (int64_t position = 0; position < count; ++position) {
        const int64_t i = position * channels + c;
        const Vec v = this->x_of_n(x, residual, i, n);
        const Vec dv = this->accumulate(to, load_n(dy + i, n), v, channel, splat(1.0f));
        if (Base::kKeepsDv) store_n(dx + i, dv, n);
      }
      keep(to, part + c);
    }
  }

  FASTDIFF_MEMBER void keep(const Sums& from, float* part) const {
    store(part, from.dv);
    store(part + row, from.dv_xhat);
    store(part + 2 * row, from.xhat);
  }

  // Adds the blocks' sums in order, then turns them into dx's terms, channel by channel.
  FASTDIFF_MEMBER void finish(int64_t sample, Range channels, const Rows& rows,
                              bool keep_sums) const {
    for (int64_t index = 0; index < blocks; ++index) {
      const float* part = part_of(sample, index);
      for (int64_t which = 0; which < 3; ++which) {
        for (int64_t c = channels.first + which * row; c < channels.last + which * row;
             c += kWidth) {
          const Vec before = index == 0 ? splat(0.0f) : load(rows.dv + c);
          store(rows.dv + c, before + load(part + c));
        }
      }
    }
    for (int64_t group = channels.first / this->width; group * this->width < channels.last;
         ++group) {
      const int64_t first = group * this->width;
      float level, slope;
      this->finish_group(sample, group, rows.dv + first, rows.dv_xhat + first, rows.xhat + first,
                         &level, &slope, keep_sums);
      for (int64_t c = first; c < first + this->width; ++c) {
        rows.level[c] = level;
        rows.slope[c] = slope;
      }
    }
  }

  FASTDIFF_MEMBER void write(int64_t sample, int64_t index, Range range, const Rows& rows) const {
    const int64_t channels = shape.channels, count = count_of(index);
    const int64_t offset = (sample * shape.positions + index * block) * channels;
    const T* x = this->x_at(offset);
    const T* residual = this->residual_at(offset);
    T* dx = static_cast<T*>(call.dx) + offset;
    const T* dy = Base::kKeepsDv ? dx : this->dy_at(offset);
    for (int64_t c = range.first; c < range.last; c += kWidth) {
      const int n = static_cast<int>(smaller(range.last - c, kWidth));
      const Channel channel = channel_of(rows, c);
      const Gradient gradient = {channel.gain * channel.rstd, load(rows.level + c),
                                 load(rows.slope + c)};
      for (int64_t position = 0; position < count; ++position) {
        const int64_t i = position * channels + c;
        if (n == kWidth) {
          const Vec xhat = Base::xhat_of(this->x_of(x, residual, i), channel);
          const Vec dv = Base::kKeepsDv ? load(dy + i) : Base::dv_of(load(dy + i), xhat, channel);
          store(dx + i, Base::dx_of(dv, xhat, gradient));
        } else {
          const Vec xhat = Base::xhat_of(this->x_of_n(x, residual, i, n), channel);
          const Vec to = load_n(dy + i, n);
          const Vec dv = Base::kKeepsDv ? to : Base::dv_of(to, xhat, channel);
          store_n(dx + i, Base::dx_of(dv, xhat, gradient), n);
        }
      }
    }
  }
};

template <typename T, bool kResidual, bool kSilu>
void run_channels_last_backward(const ChannelsLastBackward<T, kResidual, kSilu>& slab, int team) {
  const int64_t samples = slab.shape.samples, blocks = slab.blocks;
  const int64_t slabs = slabs_of(slab.shape, team);
  const Range all = {0, slab.shape.channels};
#pragma omp parallel num_threads(team) if (team > 1)
  {
    const auto rows = slab.rows();
    if (slabs > 0) {  // what the first pass reads is still cached in the second
      const int64_t width = slab.shape.channels / slabs;
#pragma omp for schedule(static)
      for (int64_t item = 0; item < samples * slabs; ++item) {
        const int64_t sample = item / slabs, first = item % slabs * width;
        const Range channels = {first, first + width};
        slab.prepare(sample, channels, rows);
        for (int64_t index = 0; index < blocks; ++index) slab.add_up(sample, index, channels, rows);
        slab.finish(sample, channels, rows, true);
        for (int64_t index = 0; index < blocks; ++index) slab.write(sample, index, channels, rows);
      }
    } else {
      int64_t prepared = -1;
#pragma omp for schedule(static)
      for (int64_t part = 0; part < samples * blocks; ++part) {
        if (part / blocks != prepared) slab.prepare(part / blocks, all, rows);
        prepared = part / blocks;
        slab.add_up(part / blocks, part % blocks, all, rows);
      }
      prepared = -1;
#pragma omp for schedule(static)
      for (int64_t part = 0; part < samples * blocks; ++part) {
        if (part / blocks != prepared) {
          slab.prepare(part / blocks, all, rows);
          slab.finish(part / blocks, all, rows, part % blocks == 0);
        }
        prepared = part / blocks;
        slab.write(part / blocks, part % blocks, all, rows);
      }
    }
  }
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

// group_norm_silu, backward: the gradients of x, weight, bias, scale, shift and add.
//
//   dv = dy · (σ(v) + v·σ(v)·(1 − σ(v)))       or dy without the activation; v, x̂ recomputed from x
//   dx = rstd · (gain·dv − c1 − x̂·c2)          c1, c2: means over the group of gain·dv and gain·dv·x̂
//
// Layouts: planar and channels_last; float32, bfloat16, float16. Bytes moved: dy and x once from
// memory and once from cache, dx once. Floor: 3 passes.
//
// First pass: Σ dv, Σ dv·x̂ and Σ x̂ per channel and piece of its positions; second pass: dx. Pieces
// depend on the shape alone and are added in order: no result depends on the number of threads.
// With float32 the first pass leaves dv where dx is to come, and the second spares the sigmoid.
#include "group_norm.h"
#include "kernels.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t kPiece = 65536;         // planar: positions of a channel that threads share out
constexpr int64_t kBlockElements = 8192;  // channels_last: a block of positions

// Per channel: x̂ = (x − mean)·rstd and v = x̂·gain + offset; mean includes the embedding.
struct Channel {
  Vec mean, rstd, gain, offset;
};

// dx = dv·scaled − level − x̂·slope.
struct Gradient {
  Vec scaled, level, slope;
};

struct Sums {
  Vec dv{}, dv_xhat{}, xhat{};
};

template <typename T, bool kSilu>
FASTDIFF_VEC Vec through_activation(Vec dy, Vec xhat, const Channel& channel) {
  if (!kSilu) return dy;
  const Vec v = fma(xhat, channel.gain, channel.offset);
  const Vec s = sigmoid<T>(v);
  return dy * fma(v * s, splat(1.0f) - s, s);
}

template <typename T, bool kResidual, bool kSilu>
struct Backward {
  static constexpr bool kKeepsDv = kSilu && sizeof(T) == sizeof(float);
  const GroupNormShape& shape;
  const GroupNormBackward& call;
  const Coefficients& coefficients;
  float* totals;  // (3, samples, row): Σ dv, Σ dv·x̂ and Σ dx over the positions
  float* sums;    // Σ dv, Σ dv·x̂ and Σ x̂ of every piece, laid out by the layout's own code
  int64_t width = shape.channels / shape.groups;
  int64_t row = padded(shape.channels);

  FASTDIFF_MEMBER const T* x_at(int64_t offset) const {
    return static_cast<const T*>(call.x) + offset;
  }
  FASTDIFF_MEMBER const T* dy_at(int64_t offset) const {
    return static_cast<const T*>(call.dy) + offset;
  }
  FASTDIFF_MEMBER const T* residual_at(int64_t offset) const {
    return kResidual ? static_cast<const T*>(call.add) + offset : nullptr;
  }
  FASTDIFF_MEMBER float* result(int which, int64_t sample) const {
    return totals + (which * shape.samples + sample) * row;
  }

  FASTDIFF_MEMBER static Vec xhat_of(Vec x, const Channel& channel) {
    return (x - channel.mean) * channel.rstd;
  }
  FASTDIFF_MEMBER static Vec x_of(const T* x, const T* residual, int64_t i) {
    return kResidual ? load(x + i) + load(residual + i) : load(x + i);
  }
  FASTDIFF_MEMBER static Vec x_of_n(const T* x, const T* residual, int64_t i, int n) {
    return kResidual ? load_n(x + i, n) + load_n(residual + i, n) : load_n(x + i, n);
  }

  // dy may be dv already, kept by the first pass.
  FASTDIFF_MEMBER static Vec dx_of(Vec dy, Vec x, const Channel& channel, const Gradient& g) {
    const Vec xhat = xhat_of(x, channel);
    const Vec dv = kKeepsDv ? dy : through_activation<T, kSilu>(dy, xhat, channel);
    return fma(dv, g.scaled, -g.level) - xhat * g.slope;
  }

  // The group's c1·rstd and c2·rstd from its channels' sums, and Σ dx per channel.
  FASTDIFF_MEMBER void finish_group(int64_t sample, int64_t group, const float* dv,
                                    const float* dv_xhat, const float* xhat, float* level,
                                    float* slope, bool keep) const {
    const float* gain = coefficients.gain_of(sample) + group * width;
    const double elements = static_cast<double>(width * shape.positions);
    double total = 0, total_xhat = 0;
    for (int64_t c = 0; c < width; ++c) {
      total += static_cast<double>(gain[c]) * dv[c];
      total_xhat += static_cast<double>(gain[c]) * dv_xhat[c];
    }
    const double rstd = call.rstd[sample * shape.groups + group];
    const double c1 = total / elements, c2 = total_xhat / elements;
    *level = static_cast<float>(c1 * rstd);
    *slope = static_cast<float>(c2 * rstd);
    if (!keep) return;
    float* out_dv = result(0, sample) + group * width;
    float* out_dv_xhat = result(1, sample) + group * width;
    float* out_dx = result(2, sample) + group * width;
    for (int64_t c = 0; c < width; ++c) {
      out_dv[c] = dv[c];
      out_dv_xhat[c] = dv_xhat[c];
      out_dx[c] = static_cast<float>(rstd * (static_cast<double>(gain[c]) * dv[c] -
                                             c1 * static_cast<double>(shape.positions) -
                                             c2 * xhat[c]));
    }
  }

  // The small gradients from the totals; two rows of scratch.
  FASTDIFF_MEMBER void write_parameters(float* scratch) const {
    const int64_t channels = shape.channels;
    const bool film = call.scale != nullptr;
    if (call.dweight != nullptr) {
      float* share = scratch;
      float* total = scratch + row;
      for (int which = 0; which < 2; ++which) {
        for (int64_t c = 0; c < row; c += kWidth) store(total + c, Vec{});
        for (int64_t sample = 0; sample < shape.samples; ++sample) {
          const float* from = result(which, sample);
          if (film) {
            read_row(shape.film_dtype, call.scale, sample * shape.scale_stride, share, channels);
          }
          for (int64_t c = 0; c < channels; c += kWidth) {
            const Vec part = film ? fma(load(share + c), load(from + c), load(from + c))
                                  : load(from + c);
            store(total + c, load(total + c) + part);
          }
        }
        write_row(shape.affine_dtype, total, which == 0 ? call.dbias : call.dweight, 0, channels);
      }
    }
    for (int64_t sample = 0; sample < shape.samples; ++sample) {
      const float* dv = result(0, sample);
      const float* dv_xhat = result(1, sample);
      const int64_t at = sample * channels;
      if (call.dscale != nullptr) {
        for (int64_t c = 0; c < channels; c += kWidth) {
          store(scratch + c, fma(load(coefficients.weight + c), load(dv_xhat + c),
                                 load(coefficients.bias + c) * load(dv + c)));
        }
        write_row(shape.film_dtype, scratch, call.dscale, at, channels);
        write_row(shape.film_dtype, dv, call.dshift, at, channels);
      }
      if (call.dadd != nullptr) {
        write_row(shape.add_dtype, result(2, sample), call.dadd, at, channels);
      }
    }
  }
};

// --- Planar -----------------------------------------------------------------------------------

template <typename T, bool kResidual, bool kSilu>
struct Planar : Backward<T, kResidual, kSilu> {
  using Base = Backward<T, kResidual, kSilu>;
  using Base::call, Base::coefficients, Base::shape, Base::sums;
  int64_t pieces = ceil_div(shape.positions, kPiece);

  FASTDIFF_MEMBER Channel channel_of(int64_t sample, int64_t c) const {
    const int64_t group = sample * shape.groups + c / this->width;
    const float* embedding = coefficients.embedding_of(sample);
    const float add = embedding == nullptr ? 0.0f : embedding[c];
    return {splat(call.mean[group] - add), splat(call.rstd[group]),
            splat(coefficients.gain_of(sample)[c]), splat(coefficients.offset_of(sample)[c])};
  }

  FASTDIFF_MEMBER float* sums_of(int which, int64_t sample, int64_t c, int64_t piece) const {
    const int64_t stride = shape.samples * shape.channels * pieces;
    return sums + which * stride + (sample * shape.channels + c) * pieces + piece;
  }

  FASTDIFF_MEMBER void add_up(int64_t sample, int64_t c, int64_t piece) const {
    const int64_t offset = (sample * shape.channels + c) * shape.positions;
    const T* x = this->x_at(offset);
    const T* dy = this->dy_at(offset);
    const T* residual = this->residual_at(offset);
    T* dx = static_cast<T*>(call.dx) + offset;
    const Channel channel = channel_of(sample, c);
    const int64_t end = smaller((piece + 1) * kPiece, shape.positions);
    Sums two[2];
    int64_t i = piece * kPiece;
    for (; i + kWidth <= end; i += kWidth) {
      Sums& to = two[i / kWidth & 1];
      const Vec v = this->x_of(x, residual, i);
      const Vec dv = accumulate(to, load(dy + i), v, channel, splat(1.0f));
      if (Base::kKeepsDv) store(dx + i, dv);
    }
    if (i < end) {
      const int n = static_cast<int>(end - i);
      const Vec v = this->x_of_n(x, residual, i, n);
      const Vec dv = accumulate(two[0], load_n(dy + i, n), v, channel, ones_n(n));
      if (Base::kKeepsDv) store_n(dx + i, dv, n);
    }
    *sums_of(0, sample, c, piece) = sum(two[0].dv + two[1].dv);
    *sums_of(1, sample, c, piece) = sum(two[0].dv_xhat + two[1].dv_xhat);
    *sums_of(2, sample, c, piece) = sum(two[0].xhat + two[1].xhat);
  }

  FASTDIFF_MEMBER Vec accumulate(Sums& to, Vec dy, Vec x, const Channel& channel,
                                 Vec lanes) const {
    const Vec xhat = this->xhat_of(x, channel) * lanes;
    const Vec dv = through_activation<T, kSilu>(dy, xhat, channel);  // 0 beyond the end, as dy is
    to.dv += dv;
    to.dv_xhat = fma(dv, xhat, to.dv_xhat);
    to.xhat += xhat;
    return dv;
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

  FASTDIFF_MEMBER void write(int64_t sample, int64_t c, int64_t piece, float level,
                             float slope) const {
    const int64_t offset = (sample * shape.channels + c) * shape.positions;
    const T* x = this->x_at(offset);
    const T* residual = this->residual_at(offset);
    T* dx = static_cast<T*>(call.dx) + offset;
    const T* dy = Base::kKeepsDv ? dx : this->dy_at(offset);
    const Channel channel = channel_of(sample, c);
    const Gradient gradient = {channel.gain * channel.rstd, splat(level), splat(slope)};
    const int64_t end = smaller((piece + 1) * kPiece, shape.positions);
    int64_t i = piece * kPiece;
    for (; i + kWidth <= end; i += kWidth) {
      store(dx + i, Base::dx_of(load(dy + i), this->x_of(x, residual, i), channel, gradient));
    }
    if (i < end) {
      const int n = static_cast<int>(end - i);
      store_n(dx + i, Base::dx_of(load_n(dy + i, n), this->x_of_n(x, residual, i, n), channel, gradient),
              n);
    }
  }

};

template <typename T, bool kResidual, bool kSilu>
void run_planar(const Planar<T, kResidual, kSilu>& planar, float* scratch, int team) {
  const GroupNormShape& shape = planar.shape;
  const int64_t items = shape.samples * shape.groups, width = planar.width;
  const int64_t pieces = planar.pieces, group_pieces = width * pieces;
  const bool whole_groups = group_pieces == 1 || items >= 2 * team;
  const int64_t row = padded(width);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    float* dv = scratch + thread_index() * 3 * row;
    if (whole_groups) {  // what the first pass reads is still cached in the second
#pragma omp for schedule(static)
      for (int64_t item = 0; item < items; ++item) {
        const int64_t sample = item / shape.groups, group = item % shape.groups;
        for (int64_t p = 0; p < group_pieces; ++p) {
          planar.add_up(sample, group * width + p / pieces, p % pieces);
        }
        float level, slope;
        planar.merge(sample, group, dv, dv + row, dv + 2 * row);
        planar.finish_group(sample, group, dv, dv + row, dv + 2 * row, &level, &slope, true);
        for (int64_t p = 0; p < group_pieces; ++p) {
          planar.write(sample, group * width + p / pieces, p % pieces, level, slope);
        }
      }
    } else {
#pragma omp for schedule(static)
      for (int64_t p = 0; p < items * group_pieces; ++p) {
        const int64_t channel = p / pieces;
        planar.add_up(channel / shape.channels, channel % shape.channels, p % pieces);
      }
      int64_t merged = -1;
      float level = 0, slope = 0;
#pragma omp for schedule(static)
      for (int64_t p = 0; p < items * group_pieces; ++p) {
        const int64_t item = p / group_pieces, channel = p / pieces;
        const int64_t sample = item / shape.groups, group = item % shape.groups;
        if (item != merged) {
          planar.merge(sample, group, dv, dv + row, dv + 2 * row);
          planar.finish_group(sample, group, dv, dv + row, dv + 2 * row, &level, &slope,
                              p % group_pieces == 0);
          merged = item;
        }
        planar.write(sample, channel % shape.channels, p % pieces, level, slope);
      }
    }
  }
}

// --- channels_last ----------------------------------------------------------------------------

template <typename T, bool kResidual, bool kSilu>
struct ChannelsLast : Backward<T, kResidual, kSilu> {
  using Base = Backward<T, kResidual, kSilu>;
  using Base::call, Base::coefficients, Base::row, Base::shape, Base::sums;
  float* scratch;  // (team, 9, row)
  int64_t block = kBlockElements / shape.channels > 0 ? kBlockElements / shape.channels : 1;
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

  FASTDIFF_MEMBER void prepare(int64_t sample, const Rows& to) const {
    const float* gain = coefficients.gain_of(sample);
    const float* offset = coefficients.offset_of(sample);
    const float* embedding = coefficients.embedding_of(sample);
    for (int64_t group = 0; group < shape.groups; ++group) {
      const float mean = call.mean[sample * shape.groups + group];
      const float rstd = call.rstd[sample * shape.groups + group];
      for (int64_t c = group * this->width; c < (group + 1) * this->width; ++c) {
        to.mean[c] = embedding == nullptr ? mean : mean - embedding[c];
        to.rstd[c] = rstd;
      }
    }
    memcpy(to.gain, gain, row * sizeof(float));
    memcpy(to.offset, offset, row * sizeof(float));
  }

  FASTDIFF_MEMBER static Channel channel_of(const Rows& rows, int64_t c) {
    return {load(rows.mean + c), load(rows.rstd + c), load(rows.gain + c), load(rows.offset + c)};
  }

  FASTDIFF_MEMBER float* part_of(int64_t sample, int64_t index) const {
    return sums + (sample * blocks + index) * 3 * row;
  }

  FASTDIFF_MEMBER void add_up(int64_t sample, int64_t index, const Rows& rows) const {
    const int64_t channels = shape.channels, count = count_of(index);
    const int64_t offset = (sample * shape.positions + index * block) * channels;
    const T* x = this->x_at(offset);
    const T* dy = this->dy_at(offset);
    const T* residual = this->residual_at(offset);
    T* dx = static_cast<T*>(call.dx) + offset;
    float* part = part_of(sample, index);
    int64_t c = 0;
    for (; c + 2 * kWidth <= channels; c += 2 * kWidth) {
      const Channel channel[2] = {channel_of(rows, c), channel_of(rows, c + kWidth)};
      Sums to[2];
      for (int64_t position = 0; position < count; ++position) {
        const int64_t at = position * channels + c;
        for (int u = 0; u < 2; ++u) {
          const int64_t i = at + u * kWidth;
          const Vec dv = accumulate(to[u], load(dy + i), this->x_of(x, residual, i), channel[u]);
          if (Base::kKeepsDv) store(dx + i, dv);
        }
      }
      for (int u = 0; u < 2; ++u) keep(to[u], part + c + u * kWidth);
    }
    for (; c < channels; c += kWidth) {
      const int n = static_cast<int>(smaller(channels - c, kWidth));
      const Channel channel = channel_of(rows, c);
      Sums to;
      for (int64_t position = 0; position < count; ++position) {
        const int64_t i = position * channels + c;
        const Vec v = this->x_of_n(x, residual, i, n);
        const Vec dv = accumulate(to, load_n(dy + i, n), v, channel);
        if (Base::kKeepsDv) store_n(dx + i, dv, n);
      }
      keep(to, part + c);
    }
  }

  FASTDIFF_MEMBER static Vec accumulate(Sums& to, Vec dy, Vec x, const Channel& channel) {
    const Vec xhat = Base::xhat_of(x, channel);
    const Vec dv = through_activation<T, kSilu>(dy, xhat, channel);
    to.dv += dv;
    to.dv_xhat = fma(dv, xhat, to.dv_xhat);
    to.xhat += xhat;
    return dv;
  }

  FASTDIFF_MEMBER void keep(const Sums& from, float* part) const {
    store(part, from.dv);
    store(part + row, from.dv_xhat);
    store(part + 2 * row, from.xhat);
  }

  // Adds the blocks' sums in order, then turns them into dx's terms, channel by channel.
  FASTDIFF_MEMBER void finish(int64_t sample, const Rows& rows, bool keep_sums) const {
    memcpy(rows.dv, part_of(sample, 0), 3 * row * sizeof(float));
    for (int64_t index = 1; index < blocks; ++index) {
      const float* part = part_of(sample, index);
      for (int64_t c = 0; c < 3 * row; c += kWidth) {
        store(rows.dv + c, load(rows.dv + c) + load(part + c));
      }
    }
    for (int64_t group = 0; group < shape.groups; ++group) {
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

  FASTDIFF_MEMBER void write(int64_t sample, int64_t index, const Rows& rows) const {
    const int64_t channels = shape.channels, count = count_of(index);
    const int64_t offset = (sample * shape.positions + index * block) * channels;
    const T* x = this->x_at(offset);
    const T* residual = this->residual_at(offset);
    T* dx = static_cast<T*>(call.dx) + offset;
    const T* dy = Base::kKeepsDv ? dx : this->dy_at(offset);
    for (int64_t c = 0; c < channels; c += kWidth) {
      const int n = static_cast<int>(smaller(channels - c, kWidth));
      const Channel channel = channel_of(rows, c);
      const Gradient gradient = {channel.gain * channel.rstd, load(rows.level + c),
                                 load(rows.slope + c)};
      for (int64_t position = 0; position < count; ++position) {
        const int64_t i = position * channels + c;
        if (n == kWidth) {
          store(dx + i, Base::dx_of(load(dy + i), this->x_of(x, residual, i), channel, gradient));
        } else {
          const Vec v = Base::dx_of(load_n(dy + i, n), this->x_of_n(x, residual, i, n), channel, gradient);
          store_n(dx + i, v, n);
        }
      }
    }
  }

};

template <typename T, bool kResidual, bool kSilu>
void run_channels_last(const ChannelsLast<T, kResidual, kSilu>& slab, int team) {
  const int64_t samples = slab.shape.samples, blocks = slab.blocks;
  const bool whole_samples = samples % team == 0 || samples >= 4 * team;
#pragma omp parallel num_threads(team) if (team > 1)
  {
    const auto rows = slab.rows();
    if (whole_samples) {
#pragma omp for schedule(static)
      for (int64_t sample = 0; sample < samples; ++sample) {
        slab.prepare(sample, rows);
        for (int64_t index = 0; index < blocks; ++index) slab.add_up(sample, index, rows);
        slab.finish(sample, rows, true);
        for (int64_t index = 0; index < blocks; ++index) slab.write(sample, index, rows);
      }
    } else {
      int64_t prepared = -1;
#pragma omp for schedule(static)
      for (int64_t part = 0; part < samples * blocks; ++part) {
        if (part / blocks != prepared) slab.prepare(part / blocks, rows);
        prepared = part / blocks;
        slab.add_up(part / blocks, part % blocks, rows);
      }
      prepared = -1;
#pragma omp for schedule(static)
      for (int64_t part = 0; part < samples * blocks; ++part) {
        if (part / blocks != prepared) {
          slab.prepare(part / blocks, rows);
          slab.finish(part / blocks, rows, part % blocks == 0);
        }
        prepared = part / blocks;
        slab.write(part / blocks, part % blocks, rows);
      }
    }
  }
}

template <typename T, bool kResidual, bool kSilu>
int64_t run(const GroupNormShape& shape, const GroupNormBackward& call, float* workspace,
            int threads) {
  const int team = team_of(shape, threads);
  Arena arena{workspace};
  const Coefficients coefficients = read_coefficients(shape, call, arena);
  float* totals = arena.take(3 * shape.samples * padded(shape.channels));
  const Backward<T, kResidual, kSilu> base{shape, call, coefficients, totals, nullptr};
  if (shape.channels_last) {
    ChannelsLast<T, kResidual, kSilu> slab{base, nullptr};
    slab.sums = arena.take(shape.samples * slab.blocks * 3 * slab.row);
    slab.scratch = arena.take(team * 9 * slab.row);
    if (workspace != nullptr) {
      run_channels_last(slab, team);
      slab.write_parameters(slab.scratch);
    }
    return arena.used;
  }
  Planar<T, kResidual, kSilu> planar{base};
  planar.sums = arena.take(3 * shape.samples * shape.channels * planar.pieces);
  float* scratch = arena.take(team * 3 * planar.row);
  if (workspace != nullptr) {
    run_planar(planar, scratch, team);
    planar.write_parameters(scratch);
  }
  return arena.used;
}

template <typename T>
int64_t run_dtype(const GroupNormShape& shape, const GroupNormBackward& call, float* workspace,
                  int threads) {
  const bool residual = shape.add == Add::kResidual;
  if (residual && shape.silu) return run<T, true, true>(shape, call, workspace, threads);
  if (residual) return run<T, true, false>(shape, call, workspace, threads);
  if (shape.silu) return run<T, false, true>(shape, call, workspace, threads);
  return run<T, false, false>(shape, call, workspace, threads);
}

}  // namespace

int64_t group_norm_silu_backward(const GroupNormShape& shape, const GroupNormBackward& call,
                                 float* workspace, int threads) {
  switch (shape.dtype) {
    case DType::kFloat32:
      return run_dtype<float>(shape, call, workspace, threads);
    case DType::kBFloat16:
      return run_dtype<BFloat16>(shape, call, workspace, threads);
    case DType::kFloat16:
      return run_dtype<Float16>(shape, call, workspace, threads);
  }
  return 0;
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

// group_norm_silu, backward: what the planar and the channels_last passes share.
#pragma once

#include "group_norm.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

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

// What the element type does not change.
struct BackwardSums {
  const GroupNormShape& shape;
  const GroupNormBackward& call;
  const Coefficients& coefficients;
  float* totals;  // (3, samples, row): Σ dv, Σ dv·x̂ and Σ dx over the positions
  float* sums;    // Σ dv, Σ dv·x̂ and Σ x̂ of every piece, laid out by the layout's own code
  int64_t width = shape.channels / shape.groups;
  int64_t row = padded(shape.channels);

  FASTDIFF_MEMBER float* result(int which, int64_t sample) const {
    return totals + (which * shape.samples + sample) * row;
  }

  // The group's c1·rstd and c2·rstd from its channels' sums, and Σ dx per channel.
  FASTDIFF_ONCE void finish_group(int64_t sample, int64_t group, const float* dv,
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
      out_dx[c] =
          static_cast<float>(rstd * (static_cast<double>(gain[c]) * dv[c] -
                                     c1 * static_cast<double>(shape.positions) - c2 * xhat[c]));
    }
  }

  // The small gradients from the totals; two rows of scratch.
  FASTDIFF_ONCE void write_parameters(float* scratch) const {
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
            const Vec part =
                film ? fma(load(share + c), load(from + c), load(from + c)) : load(from + c);
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

template <typename T, bool kResidual, bool kSilu>
struct Backward : BackwardSums {
  static constexpr bool kKeepsDv = kSilu && sizeof(T) == sizeof(float);

  FASTDIFF_MEMBER const T* x_at(int64_t offset) const {
    return static_cast<const T*>(call.x) + offset;
  }
  FASTDIFF_MEMBER const T* dy_at(int64_t offset) const {
    return static_cast<const T*>(call.dy) + offset;
  }
  FASTDIFF_MEMBER const T* residual_at(int64_t offset) const {
    return kResidual ? static_cast<const T*>(call.add) + offset : nullptr;
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

  FASTDIFF_MEMBER static Vec dv_of(Vec dy, Vec xhat, const Channel& channel) {
    return through_activation<T, kSilu>(dy, xhat, channel);
  }
  FASTDIFF_MEMBER static Vec dx_of(Vec dv, Vec xhat, const Gradient& g) {
    return fma(dv, g.scaled, -g.level) - xhat * g.slope;
  }
  // Beyond the end, where `lanes` and dy are zero, nothing is added.
  FASTDIFF_MEMBER static Vec accumulate(Sums& to, Vec dy, Vec x, const Channel& channel,
                                        Vec lanes) {
    const Vec xhat = xhat_of(x, channel) * lanes;
    const Vec dv = dv_of(dy, xhat, channel);
    to.dv += dv;
    to.dv_xhat = fma(dv, xhat, to.dv_xhat);
    to.xhat += xhat;
    return dv;
  }
};

}  // namespace fastdiff::cpu::FASTDIFF_ISA

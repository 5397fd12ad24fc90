// A few numbers for each channel: one thread, as they are made in less time than threads take to start.
#include "norm_coefficients.h"

#include "vector.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

void norm_coefficients(const NormCoefficientsShape& s, const NormCoefficientsCall& call) {
  const int64_t channels = s.channels + s.second_channels;
  const int64_t width = s.groups > 0 ? channels / s.groups : 0;
  for (int64_t n = 0; n < s.samples; ++n) {
    const float* const first = call.moments + n * 2 * s.channels;
    const float* const second = call.second + n * 2 * s.second_channels;
    const auto mean_of = [&](int64_t c) {
      return c < s.channels ? first[c] : second[c - s.channels];
    };
    const auto variance_of = [&](int64_t c) {
      return c < s.channels ? first[s.channels + c]
                            : second[s.second_channels + c - s.channels];
    };
    float* const gain = call.coefficients + n * 2 * channels;
    float* const offset = gain + channels;
    const float* const scale = call.scale == nullptr ? nullptr : call.scale + n * s.film_stride;
    const float* const shift = call.shift == nullptr ? nullptr : call.shift + n * s.film_stride;
    for (int64_t start = 0; start < channels; start += width) {
      float mean = 0.0f, variance = 0.0f;
      for (int64_t c = start; c < start + width; ++c) mean += mean_of(c);
      mean /= static_cast<float>(width);
      // What a group's channels vary by, and what their means do.
      for (int64_t c = start; c < start + width; ++c) {
        const float off = mean_of(c) - mean;
        variance += variance_of(c) + off * off;
      }
      const float rstd = 1.0f / __builtin_sqrtf(variance / static_cast<float>(width) + s.eps);
      for (int64_t c = start; c < start + width; ++c) {
        gain[c] = rstd * call.weight[c];
        offset[c] = call.bias[c] - mean * gain[c];
      }
    }
    if (scale == nullptr) continue;
    for (int64_t c = 0; c < channels; ++c) {
      gain[c] *= 1.0f + scale[c];
      offset[c] = offset[c] * (1.0f + scale[c]) + shift[c];
    }
  }
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

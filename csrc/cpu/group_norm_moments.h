// Statistics of group_norm_silu: a stream's mean and sum of squared deviations in one reading.
#pragma once

#include "group_norm.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

constexpr int64_t kBlockVectors = 256;

// How many of n values give the shift s of Σ(x − s)²: their mean. With one alone, an outlier there
// would cancel all the others; among √n it moves s by v/√n, and n·(v/√n)² is no more than the v²
// that belongs to the sum anyway.
FASTDIFF_VEC int64_t shift_values(int64_t n) {
  int64_t root = 1;
  while (root * root < n) ++root;
  return root;
}

struct Moments {
  float count, mean, m2;
};

FASTDIFF_VEC Moments merge(Moments a, Moments b) {
  if (a.count == 0.0f) return b;
  const double total = static_cast<double>(a.count) + b.count;
  const double delta = static_cast<double>(b.mean) - a.mean;
  const double mean = a.mean + delta * (b.count / total);
  const double m2 =
      static_cast<double>(a.m2) + b.m2 + delta * delta * (a.count * (b.count / total));
  return {static_cast<float>(total), static_cast<float>(mean), static_cast<float>(m2)};
}

FASTDIFF_VEC float rstd_of(float m2, double count, float eps) {
  return static_cast<float>(1.0 / __builtin_sqrt(m2 / count + static_cast<double>(eps)));
}

// x, or x + residual, as float32.
template <typename T, bool kResidual>
FASTDIFF_VEC Vec value(const T* x, const T* residual, int64_t i) {
  return kResidual ? load(x + i) + load(residual + i) : load(x + i);
}

template <typename T, bool kResidual>
FASTDIFF_VEC Vec value_n(const T* x, const T* residual, int64_t i, int n) {
  return kResidual ? load_n(x + i, n) + load_n(residual + i, n) : load_n(x + i, n);
}

// The moments of a stream of runs, lane by lane.
struct Scan {
  Vec shift{}, sum{}, square{}, count{};  // of the block under way
  Vec mean{}, m2{}, total{};              // of the blocks before
  int64_t vectors = 0;

  template <typename T, bool kResidual>
  FASTDIFF_MEMBER void run(const T* x, const T* residual, int64_t length, Vec add) {
    int64_t i = 0;
    while (i + kWidth <= length) {
      const int64_t n = smaller((length - i) / kWidth, kBlockVectors - vectors);
      if (vectors == 0) {
        const int64_t first = shift_values(n);
        Vec start{};
        for (int64_t v = 0; v < first; ++v)
          start += value<T, kResidual>(x, residual, i + v * kWidth);
        shift = start * splat(1.0f / static_cast<float>(first)) + add;
      }
      const Vec base = shift - add;
      Vec s[4] = {}, q[4] = {};
      int64_t v = 0;
      for (; v + 4 <= n; v += 4) {
        for (int u = 0; u < 4; ++u) {
          const Vec d = value<T, kResidual>(x, residual, i + (v + u) * kWidth) - base;
          s[u] += d;
          q[u] = fma(d, d, q[u]);
        }
      }
      for (; v < n; ++v) {
        const Vec d = value<T, kResidual>(x, residual, i + v * kWidth) - base;
        s[0] += d;
        q[0] = fma(d, d, q[0]);
      }
      sum += (s[0] + s[1]) + (s[2] + s[3]);
      square += (q[0] + q[1]) + (q[2] + q[3]);
      count += splat(static_cast<float>(n));
      vectors += n;
      i += n * kWidth;
      if (vectors >= kBlockVectors) finish_block();
    }
    if (i < length) {
      const int n = static_cast<int>(length - i);
      const Vec v = value_n<T, kResidual>(x, residual, i, n) + add;
      const Vec lanes = ones_n(n);
      if (vectors == 0) shift = splat(fastdiff::cpu::FASTDIFF_ISA::sum(v * lanes) / n);
      const Vec d = (v - shift) * lanes;
      sum += d;
      square = fma(d, d, square);
      count += lanes;
      if (++vectors >= kBlockVectors) finish_block();
    }
  }

  FASTDIFF_ONCE void finish_block() {
    const Vec none = splat(0.0f);
    const Vec n = count > none ? count : splat(1.0f);
    const Vec block_mean = shift + sum / n;
    const Vec block_m2 = square - sum * (sum / n);
    const Vec together = total + n;
    const Vec delta = total > none ? block_mean - mean : block_mean;
    const Vec share = count / together;  // 0 in a lane that saw nothing
    const Vec before = mean;
    mean = total > none ? fma(delta, share, before) : block_mean;
    m2 += (block_m2 > none ? block_m2 : none) +
          (total > none ? delta * delta * (total * share) : none);
    total += count;
    sum = square = count = Vec{};
    vectors = 0;
  }

  FASTDIFF_ONCE Moments moments() {
    if (vectors > 0) finish_block();
    const float elements = fastdiff::cpu::FASTDIFF_ISA::sum(total);
    const Vec seen = total > splat(0.0f) ? splat(1.0f) : splat(0.0f);
    const Vec from = splat(mean[0]);
    const Vec offset = (mean - from) * seen;
    const float shifted = fastdiff::cpu::FASTDIFF_ISA::sum(offset * total) / elements;
    const Vec apart = (offset - splat(shifted)) * seen;
    return {elements, mean[0] + shifted,
            fastdiff::cpu::FASTDIFF_ISA::sum(m2 + apart * apart * total)};
  }
};

}  // namespace fastdiff::cpu::FASTDIFF_ISA

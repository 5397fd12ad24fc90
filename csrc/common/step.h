// One sampler step, the arithmetic that CPU and CUDA share; fastdiff/methods/table.py has the
// equations and their sources.
//
//   output = scale·(uncond + s·(cond - uncond))                with guidance, and a sample's scale
//   x0     = clip(a·x_t + b·output)
//   std    = sigma·exp(½·(f·log_max + (1 - f)·log_min)), f = (v + 1)/2    v: learned variance
//   x_prev = c·x0 + d·x_t + o·output + e0·M0 + e1·M1 + e2·M2 + std·z
//   M_slot = k·x0 + q·x_t                                      after all are read; slot -1: none
//
// A zero c, d, o, e, sigma, k or q contributes nothing, whatever it multiplies: NaN included. Written
// for a float and for a register of them (lanes.h).
#pragma once

#include "lanes.h"

namespace fastdiff {

// StepTable's packed columns, fastdiff/methods/table.py: COLUMNS
constexpr int kStepColumns = 17;

struct StepRow {
  float a, b, c, d, o, e0, e1, e2, sigma, log_min, log_max, clip, slot, k, q;
};

FASTDIFF_INLINE StepRow step_row(const float* packed, int64_t row) {
  const float* r = packed + row * kStepColumns;
  return {r[0], r[1], r[2],  r[3],  r[4],  r[5],  r[6], r[7],
          r[8], r[9], r[10], r[11], r[12], r[13], r[14]};
}

// The factor of what a slot of memory holds.
FASTDIFF_INLINE float memory_factor(const StepRow& row, int slot) {
  return slot == 0 ? row.e0 : slot == 1 ? row.e1 : row.e2;
}

template <typename F>
FASTDIFF_INLINE F guide(F conditional, F unconditional, float scale) {
  using L = Lanes<F>;
  return L::fma(L::splat(scale), conditional - unconditional, unconditional);
}

// sum + coefficient·value
template <typename F>
FASTDIFF_INLINE F add_term(F sum, float coefficient, F value) {
  using L = Lanes<F>;
  return coefficient != 0.0f ? L::fma(L::splat(coefficient), value, sum) : sum;
}

// NaN stays NaN: both comparisons are false.
template <typename F>
FASTDIFF_INLINE F predicted_x_start(const StepRow& row, F x_t, F output) {
  using L = Lanes<F>;
  F x0 = L::fma(L::splat(row.b), output, L::mul(L::splat(row.a), x_t));
  x0 = x0 < L::splat(-row.clip) ? L::splat(-row.clip) : x0;
  return x0 > L::splat(row.clip) ? L::splat(row.clip) : x0;
}

// Without the noise.
template <typename F>
FASTDIFF_INLINE F mean_of_step(const StepRow& row, F x0, F x_t, F output) {
  using L = Lanes<F>;
  return add_term(add_term(add_term(L::splat(0.0f), row.c, x0), row.d, x_t), row.o, output);
}

// What the row leaves in its slot of memory.
template <typename F>
FASTDIFF_INLINE F kept_of_step(const StepRow& row, F x0, F x_t) {
  using L = Lanes<F>;
  return add_term(add_term(L::splat(0.0f), row.k, x0), row.q, x_t);
}

// The standard deviation by the learned variance v (Nichol & Dhariwal 2021, eq. 15).
template <typename F>
FASTDIFF_INLINE F learned_std(const StepRow& row, F v) {
  using L = Lanes<F>;
  const F f = L::fma(v, L::splat(0.5f), L::splat(0.5f));
  const F log_variance =
      L::fma(f, L::splat(row.log_max), L::mul(L::splat(1.0f) - f, L::splat(row.log_min)));
  return L::mul(L::splat(row.sigma), L::exp(L::mul(L::splat(0.5f), log_variance)));
}

}  // namespace fastdiff

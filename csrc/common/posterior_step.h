// What posterior_step is asked to do, on any device: a plan of shapes and strides, which Python keeps
// for every call of the same kind, and one call's addresses and counters. step.h has the equations.
#pragma once

#include "elementwise.h"

namespace fastdiff {

constexpr int kSlots = 3;  // of memory

// `output`'s second half of channels, where there is one, begins at `variance_offset` elements; the
// unconditional half of its batch at `guidance_offset`.
struct PosteriorStep {
  Shape shape;
  int64_t rows;
  Layout x_t;
  Layout output;
  int64_t variance_offset;  // negative: the variance is not learned
  int64_t guidance_offset;  // negative: no guidance, or by a tensor of its own
  Layout unconditional;     // that tensor
  Layout noise;
  Layout memory[kSlots];
  Layout x_prev;
  Layout x_start;
};

struct PosteriorStepCall {
  const void* x_t;
  const void* output;
  const float* table;
  const void* unconditional;  // null: within the output, or none
  const float* output_scale;  // (samples,); null: 1
  const void* noise;          // null: drawn, or none
  void* memory[kSlots];       // null: none
  bool keeps;                 // the row writes memory; else it is only read
  void* x_prev;
  void* x_start;  // null: not wanted
  int64_t step;
  const void* step_address;  // overrides step; int64 if step_is_wide, else int32
  bool step_is_wide;
  float guidance;
  const float* guidance_address;  // overrides guidance
  bool draws;
  uint64_t seed;
  uint32_t first_step;  // the counter's step of row 0
  uint64_t first_sample;
};

}  // namespace fastdiff

// What the elementwise kernels are asked to do, on any device: shapes and strides, no addresses, so
// that Python keeps one of these for every call of the same kind.
//
// Every operand's sample is a (channels, spatial) array, the same for all of them, whose element
// (c, s) has index c·spatial + s in the noise's counter and stands at sample·i + channel·c +
// spatial·s, in elements of its own dtype. Contiguous samples are one channel.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastdiff {

struct Shape {
  int64_t samples;
  int64_t channels;
  int64_t spatial;
};

struct Layout {
  DType dtype;
  int64_t sample;
  int64_t channel;
  int64_t spatial;
};

// x_t = signal[t]·x_start + sigma[t]·noise, or without the second term
struct QSample {
  Shape shape;
  int64_t rows;  // of the tables
  Layout x_start;
  Layout noise;  // given, or where the drawn noise is returned
  Layout x_t;
};

// See common/step.h. `output`'s second half of channels, where there is one, begins at
// `variance_offset` elements; the unconditional half of its batch at `guidance_offset`.
struct PosteriorStep {
  Shape shape;
  int64_t rows;
  Layout x_t;
  Layout output;
  int64_t variance_offset;  // negative: the variance is not learned
  int64_t guidance_offset;  // negative: no guidance
  Layout noise;
  Layout prev_x_start;
  Layout x_prev;
  Layout x_start;
};

// One call's addresses and counters.
struct QSampleCall {
  const void* x_start;
  const int64_t* t;     // one row a sample
  const float* signal;  // the tables
  const float* sigma;
  void* noise;  // read, or written where it is drawn; null: neither
  void* x_t;
  bool draws;
  uint64_t seed;
  uint32_t step;
  uint64_t first_sample;
};

struct PosteriorStepCall {
  const void* x_t;
  const void* output;
  const float* table;
  const void* noise;         // null: drawn, or none
  const void* prev_x_start;  // null: none
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

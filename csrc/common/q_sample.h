// What q_sample is asked to do, on any device: a plan of shapes and strides, which Python keeps for
// every call of the same kind, and one call's addresses and counters.
#pragma once

#include "elementwise.h"

namespace fastdiff {

// x_t = signal[t]·x_start + sigma[t]·noise, or without the second term
struct QSample {
  Shape shape;
  int64_t rows;  // of the tables
  Layout x_start;
  Layout noise;  // given, or where the drawn noise is returned
  Layout x_t;
};

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

}  // namespace fastdiff

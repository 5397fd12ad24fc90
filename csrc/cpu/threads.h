// Integers for cutting work into pieces, and the place of a thread in its team.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <cstdint>

#include "vector.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

FASTDIFF_VEC int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTDIFF_VEC int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
FASTDIFF_VEC int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kSerialBelow = 16384;  // elements: no more than 16 µs on one core

FASTDIFF_VEC int team_of(int64_t elements, int threads) {
  return elements < kSerialBelow ? 1 : threads;
}

// How many threads the team has, which may be fewer than it was asked to have.
FASTDIFF_VEC int thread_count() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

FASTDIFF_VEC int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

// Rows of one value per channel, whatever their dtype, as float32; and the memory they come to.
#pragma once

#include "threads.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

FASTDIFF_VEC int64_t padded(int64_t channels) { return ceil_div(channels, 16) * 16; }

// Memory handed out from one allocation of the caller's; with no base it only counts.
struct Arena {
  float* base;
  int64_t used = 0;

  FASTDIFF_MEMBER float* take(int64_t count) {
    float* at = base == nullptr ? nullptr : base + used;
    used += ceil_div(count, 16) * 16;
    return at;
  }
};

template <typename T>
FASTDIFF_VEC void write_row(const float* from, T* to, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
  if (i < count) store_n(to + i, load(from + i), static_cast<int>(count - i));
}

// `from` is padded to whole vectors.
static FASTDIFF_ONCE void write_row(DType dtype, const float* from, void* to, int64_t offset,
                                    int64_t count) {
  switch (dtype) {
    case DType::kFloat32:
      return write_row(from, static_cast<float*>(to) + offset, count);
    case DType::kBFloat16:
      return write_row(from, static_cast<BFloat16*>(to) + offset, count);
    case DType::kFloat16:
      return write_row(from, static_cast<Float16*>(to) + offset, count);
  }
}

template <typename T>
FASTDIFF_VEC void read_row(const T* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
  if (i < count) store(to + i, load_n(from + i, static_cast<int>(count - i)));
}

static FASTDIFF_ONCE void read_row(DType dtype, const void* from, int64_t offset, float* to,
                                   int64_t count) {
  switch (dtype) {
    case DType::kFloat32:
      return read_row(static_cast<const float*>(from) + offset, to, count);
    case DType::kBFloat16:
      return read_row(static_cast<const BFloat16*>(from) + offset, to, count);
    case DType::kFloat16:
      return read_row(static_cast<const Float16*>(from) + offset, to, count);
  }
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

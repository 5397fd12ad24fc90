// What the forward and the backward of group_norm_silu share on the CPU.
#pragma once

#include <type_traits>

#include "../common/group_norm_silu.h"
#include "rows.h"
#include "threads.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

constexpr int64_t kSlabBytes = 1 << 17;  // of a channels_last sample that is cut into slabs

// v = x̂·gain + offset per sample and channel, and the embedding, as float32 rows. Without FiLM
// every sample reads the same row.
struct Coefficients {
  float* weight;
  float* bias;
  float* gain;
  float* offset;
  float* embedding;  // null without one
  int64_t row;       // elements from one sample's row of gain and offset to the next
  int64_t embedding_row;

  FASTDIFF_MEMBER const float* gain_of(int64_t sample) const { return gain + sample * row; }
  FASTDIFF_MEMBER const float* offset_of(int64_t sample) const { return offset + sample * row; }
  FASTDIFF_MEMBER const float* embedding_of(int64_t sample) const {
    return embedding == nullptr ? nullptr : embedding + sample * embedding_row;
  }
};

// Call is GroupNormForward or GroupNormBackward.
template <typename Call>
static FASTDIFF_ONCE Coefficients read_coefficients(const GroupNormShape& shape, const Call& call,
                                                    Arena& arena) {
  const int64_t channels = shape.channels, row = padded(channels);
  const bool film = call.scale != nullptr;
  const int64_t rows = film ? shape.samples : 1;
  Coefficients out;
  out.row = film ? row : 0;
  out.gain = arena.take(rows * row);
  out.offset = arena.take(rows * row);
  out.embedding_row = row;
  out.embedding = shape.add == Add::kEmbedding ? arena.take(shape.samples * row) : nullptr;
  float* weight = out.weight = arena.take(row);
  float* bias = out.bias = arena.take(row);
  if (arena.base == nullptr) return out;

  if (call.weight != nullptr) {
    read_row(shape.affine_dtype, call.weight, 0, weight, channels);
    read_row(shape.affine_dtype, call.bias, 0, bias, channels);
  } else {
    for (int64_t c = 0; c < row; c += kWidth) {
      store(weight + c, splat(1.0f));
      store(bias + c, splat(0.0f));
    }
  }
  for (int64_t sample = 0; sample < rows; ++sample) {
    float* gain = out.gain + sample * row;
    float* offset = out.offset + sample * row;
    if (film) {
      read_row(shape.film_dtype, call.scale, sample * shape.scale_stride, gain, channels);
      read_row(shape.film_dtype, call.shift, sample * shape.shift_stride, offset, channels);
    }
    for (int64_t c = 0; c < channels; c += kWidth) {
      const Vec one_plus_scale = film ? splat(1.0f) + load(gain + c) : splat(1.0f);
      const Vec shift = film ? load(offset + c) : splat(0.0f);
      store(gain + c, load(weight + c) * one_plus_scale);
      store(offset + c, fma(load(bias + c), one_plus_scale, shift));
    }
  }
  for (int64_t sample = 0; out.embedding != nullptr && sample < shape.samples; ++sample) {
    read_row(shape.add_dtype, call.add, sample * shape.add_stride, out.embedding + sample * row,
             channels);
  }
  return out;
}

// Channels [first, last) of a channels_last sample: whole groups, whole vectors up to the last.
struct Range {
  int64_t first, last;
};

// Into how many slabs of equal width each channels_last sample is cut so that whole slabs keep a
// team busy; 0 where they cannot. A slab holds whole groups, vectors and cache lines. Measured, large
// samples lose by it: rows cut between cores are prefetched by both.
static FASTDIFF_ONCE int64_t slabs_of(const GroupNormShape& shape, int team) {
  const int64_t samples = shape.samples, width = shape.channels / shape.groups;
  if (samples % team == 0 || samples >= 4 * team) return 1;
  const int64_t element = shape.dtype == DType::kFloat32 ? 4 : 2;
  if (shape.channels * shape.positions * element > kSlabBytes) return 0;
  for (int64_t slabs = 2; slabs <= shape.groups; ++slabs) {
    if (shape.groups % slabs != 0 || shape.groups / slabs * width % 32 != 0) continue;
    const int64_t items = samples * slabs;
    if (items % team == 0 || items >= 4 * team) return slabs;
  }
  return 0;
}

FASTDIFF_VEC int team_of(const GroupNormShape& shape, int threads) {
  return team_of(shape.samples * shape.channels * shape.positions, threads);
}

// Calls run(T{}, kResidual, kSilu), the last two as types, for what the shape asks.
template <typename T, typename Run>
FASTDIFF_VEC int64_t with_constants(const GroupNormShape& shape, const Run& run) {
  const std::true_type yes;
  const std::false_type no;
  if (shape.add == Add::kResidual) return shape.silu ? run(T{}, yes, yes) : run(T{}, yes, no);
  return shape.silu ? run(T{}, no, yes) : run(T{}, no, no);
}

template <typename Run>
FASTDIFF_VEC int64_t with_constants(const GroupNormShape& shape, const Run& run) {
  switch (shape.dtype) {
    case DType::kFloat32:
      return with_constants<float>(shape, run);
    case DType::kBFloat16:
      return with_constants<BFloat16>(shape, run);
    case DType::kFloat16:
      return with_constants<Float16>(shape, run);
  }
  return 0;
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

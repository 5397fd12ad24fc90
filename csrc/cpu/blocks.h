// Elementwise kernels over samples of (channels, spatial): who computes which elements, and how
// operands of any dtype and stride come to be float32 in L1.
//
// A block is up to kBlock neighbouring elements of one sample in the counter's order; it falls into
// runs, one per channel. Noise is drawn a block at a time; operands are read and written a run at a
// time, straight from memory where it holds float32 without gaps and through L1 elsewhere.
#pragma once

#include "../common/elementwise.h"
#include "threads.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

constexpr int64_t kBlock = 512;          // elements: 2 KiB of float32
constexpr int64_t kCachedSample = 4096;  // elements of a strided sample that stay in L1

struct Run {
  int64_t channel;
  int64_t position;
  int64_t count;
};

// Calls work(sample, begin, end) for every block of every sample. The blocks do not depend on the
// number of threads in any way that a result could show: elements are independent.
template <typename Work>
FASTDIFF_VEC void for_each_block(const Shape& shape, int threads, const Work& work) {
  const int64_t elements = shape.channels * shape.spatial;
  const int64_t total = shape.samples * elements;
  if (total == 0) return;
  const int team = team_of(total, threads);
  // Small or contiguous samples in the counter's order; others position by position, so that the
  // channels of one pixel are met while their cache lines are near.
  const bool by_positions = shape.channels > 1 && elements > kCachedSample && shape.spatial >= 64;
  const int64_t extent = by_positions ? shape.spatial : elements;
  const int64_t unit =
      by_positions ? smaller(kBlock, larger(64, kCachedSample * 2 / shape.channels / 64 * 64))
                   : kBlock;
  // About four tiles per thread, in whole blocks, so that one large sample keeps every core busy.
  const int64_t wanted = team == 1 ? 1 : ceil_div(4 * static_cast<int64_t>(team), shape.samples);
  const int64_t tile = ceil_div(ceil_div(extent, wanted), unit) * unit;
  const int64_t tiles = ceil_div(extent, tile);

#pragma omp parallel for num_threads(team) if (team > 1) schedule(static)
  for (int64_t item = 0; item < shape.samples * tiles; ++item) {
    const int64_t sample = item / tiles;
    const int64_t first = item % tiles * tile;
    const int64_t last = smaller(first + tile, extent);
    for (int64_t begin = first; begin < last; begin += unit) {
      const int64_t end = smaller(begin + unit, last);
      if (by_positions) {
        for (int64_t channel = 0; channel < shape.channels; ++channel) {
          work(sample, channel * shape.spatial + begin, channel * shape.spatial + end);
        }
      } else {
        work(sample, begin, end);
      }
    }
  }
}

// Calls each(run, offset) for the runs of a block; offset is the run's first element in the block.
template <typename Each>
FASTDIFF_VEC void for_each_run(const Shape& shape, int64_t begin, int64_t end, const Each& each) {
  if (shape.channels == 1) return each(Run{0, begin, end - begin}, 0);
  for (int64_t element = begin; element < end;) {
    const int64_t channel = element / shape.spatial;
    const int64_t position = element - channel * shape.spatial;
    const int64_t count = smaller(end - element, shape.spatial - position);
    each(Run{channel, position, count}, element - begin);
    element += count;
  }
}

template <typename T>
FASTDIFF_VEC T* address(const void* base, const Layout& layout, int64_t sample, const Run& run) {
  return static_cast<T*>(const_cast<void*>(base)) + sample * layout.sample +
         run.channel * layout.channel + run.position * layout.spatial;
}

template <typename T>
FASTDIFF_VEC void widen_run(const T* from, int64_t stride, int64_t count, float* to) {
  if (stride == 1) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
    if (i < count) store_n(to + i, load_n(from + i, static_cast<int>(count - i)), count - i);
    return;
  }
  T gathered[kBlock];
  if (stride == 3) {  // images in channels_last: a constant stride is read by permutations
    for (int64_t i = 0; i < count; ++i) gathered[i] = from[3 * i];
  } else {
    for (int64_t i = 0; i < count; ++i) gathered[i] = from[i * stride];
  }
  for (int64_t i = 0; i < count; i += kWidth) store(to + i, load(gathered + i));
}

template <typename T>
FASTDIFF_VEC void narrow_run(const float* from, T* to, int64_t stride, int64_t count) {
  if (stride == 1) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
    if (i < count) store_n(to + i, load_n(from + i, static_cast<int>(count - i)), count - i);
    return;
  }
  T narrowed[kBlock];
  for (int64_t i = 0; i < count; i += kWidth) store(narrowed + i, load(from + i));
  for (int64_t i = 0; i < count; ++i) to[i * stride] = narrowed[i];
}

// The run as float32: in place, or copied to `block`, which has room for kBlock.
inline const float* read_run(const void* base, const Layout& layout, int64_t sample, const Run& run,
                             float* block) {
  switch (layout.dtype) {
    case DType::kFloat32: {
      const float* from = address<const float>(base, layout, sample, run);
      if (layout.spatial == 1) return from;
      widen_run(from, layout.spatial, run.count, block);
      break;
    }
    case DType::kBFloat16:
      widen_run(address<const BFloat16>(base, layout, sample, run), layout.spatial, run.count,
                block);
      break;
    case DType::kFloat16:
      widen_run(address<const Float16>(base, layout, sample, run), layout.spatial, run.count,
                block);
      break;
  }
  return block;
}

// Where a run's result may be computed: its place in memory, or `block` before write_run.
inline float* target_of_run(void* base, const Layout& layout, int64_t sample, const Run& run,
                            float* block) {
  const bool in_place = layout.dtype == DType::kFloat32 && layout.spatial == 1;
  return in_place ? address<float>(base, layout, sample, run) : block;
}

inline void write_run(const float* from, void* base, const Layout& layout, int64_t sample,
                      const Run& run) {
  switch (layout.dtype) {
    case DType::kFloat32: {
      float* to = address<float>(base, layout, sample, run);
      if (from != to) narrow_run(from, to, layout.spatial, run.count);
      break;
    }
    case DType::kBFloat16:
      narrow_run(from, address<BFloat16>(base, layout, sample, run), layout.spatial, run.count);
      break;
    case DType::kFloat16:
      narrow_run(from, address<Float16>(base, layout, sample, run), layout.spatial, run.count);
      break;
  }
}

// What is left of `values` after storing them as `dtype`; touches whole registers.
FASTDIFF_VEC void round_block(DType dtype, float* values, int64_t count) {
  if (dtype == DType::kFloat32) return;
  for (int64_t i = 0; i < count; i += kWidth) {
    const Vec v = load(values + i);
    store(values + i, dtype == DType::kBFloat16 ? to_floats(from_floats(v, BFloat16{}), BFloat16{})
                                                : to_floats(from_floats(v, Float16{}), Float16{}));
  }
}

// Calls each(i, n) for every register of a run: n lanes count, all of them but in the last.
template <typename Each>
FASTDIFF_VEC void for_each_register(int64_t count, const Each& each) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth)
    each(i, [](const float* p) { return load(p); }, [](float* p, Vec v) { store(p, v); });
  const int rest = static_cast<int>(count - i);
  if (rest > 0) {
    each(
        i, [rest](const float* p) { return load_n(p, rest); },
        [rest](float* p, Vec v) { store_n(p, v, rest); });
  }
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

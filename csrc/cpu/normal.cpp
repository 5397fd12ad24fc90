// normal: counter-based Gaussian noise (common/philox.h), written in float32, bfloat16 or float16.
//
// Layouts: samples of (channels, spatial) with any strides; contiguous and channels_last are the
// ones in use. Bytes moved: the output, once. The floor is the generator's arithmetic, not memory:
// about 150 integer and 80 float operations for four elements.
//
// Algorithm: every sample is cut into tiles of whole spatial ranges, a thread takes a tile, draws
// it channel by channel in blocks that stay in L1, and writes each block through the strides.
// Range: element indices below 2^34 (a 32-bit counter word of four elements each).
#include "../common/philox.h"
#include "kernels.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t kLanes = 16;                  // counters drawn together: one AVX-512 register
constexpr int64_t kBlock = 1024;                // elements drawn at a time: 4 KiB of float32
constexpr int64_t kSmallestTile = 256;          // spatial elements; below, tiles only cost
constexpr int64_t kSerialBelow = 4096;          // elements that one core draws before a team starts

struct Stream {
  uint64_t seed;
  uint32_t step;
  uint64_t sample;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// At least `quads` quads, in whole groups: a constant trip count leaves no scalar tail.
void draw_block(const Stream& stream, uint32_t first_quad, int64_t quads, float* __restrict out) {
  for (int64_t group = 0; group < quads; group += kLanes) {
#pragma omp simd
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      const uint32_t quad = first_quad + static_cast<uint32_t>(group + lane);
      const Normals4 normals =
          normals_of(philox_words(stream.seed, stream.step, stream.sample, quad));
      float* to = out + 4 * (group + lane);
      to[0] = normals.n[0];
      to[1] = normals.n[1];
      to[2] = normals.n[2];
      to[3] = normals.n[3];
    }
  }
}

inline void convert(float value, float* out) { *out = value; }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Both round to nearest even. Normals are finite and below 7, so neither NaN nor overflow occurs.
inline void convert(float value, BFloat16* out) {
  const uint32_t bits = bits_of(value);
  out->bits = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

inline void convert(float value, Float16* out) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal =
      (magnitude + 0x0FFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Below 2^-14 the result is subnormal: adding ½, whose ulp is float16's smallest step, rounds.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
  out->bits = static_cast<uint16_t>(sign | (magnitude < 0x38800000u ? subnormal : normal));
}

// Elements [begin, end) of one sample, which starts at `sample`.
template <typename T>
void draw_range(const NormalFill& fill, const Stream& stream, T* sample, int64_t begin,
                int64_t end) {
  alignas(64) float block[kBlock];
  const int64_t step = fill.spatial_stride;
  for (int64_t first = begin - begin % 4; first < end; first += kBlock) {
    int64_t element = first < begin ? begin : first;
    const int64_t stop = smaller(first + kBlock, end);
    draw_block(stream, static_cast<uint32_t>(first / 4), ceil_div(stop - first, 4), block);
    while (element < stop) {  // one run per channel
      const int64_t channel = element / fill.spatial;
      const int64_t position = element % fill.spatial;
      const int64_t count = smaller(stop - element, fill.spatial - position);
      T* to = sample + channel * fill.channel_stride + position * step;
      const float* from = block + (element - first);
      if (step == 1) {
        for (int64_t i = 0; i < count; ++i) convert(from[i], to + i);
      } else {
        for (int64_t i = 0; i < count; ++i) convert(from[i], to + i * step);
      }
      element += count;
    }
  }
}

template <typename T>
void fill_tiles(const NormalFill& fill, int threads) {
  const int64_t elements = fill.samples * fill.channels * fill.spatial;
  if (elements == 0) return;
  const int team = elements < kSerialBelow ? 1 : threads;
  // About four tiles per thread, in whole blocks, so that one large sample keeps every core busy.
  const int64_t tiles_wanted = team == 1 ? 1 : ceil_div(4 * static_cast<int64_t>(team), fill.samples);
  int64_t tile = ceil_div(ceil_div(fill.spatial, tiles_wanted), kSmallestTile) * kSmallestTile;
  tile = smaller(tile, fill.spatial);
  const int64_t tiles = ceil_div(fill.spatial, tile);

#pragma omp parallel for num_threads(team) if (team > 1) schedule(static)
  for (int64_t item = 0; item < fill.samples * tiles; ++item) {
    const int64_t sample = item / tiles;
    const int64_t begin = (item % tiles) * tile;
    const int64_t end = smaller(begin + tile, fill.spatial);
    const Stream stream = {fill.seed, fill.step, fill.first_sample + static_cast<uint64_t>(sample)};
    T* out = static_cast<T*>(fill.out) + sample * fill.sample_stride;
    if (tiles == 1) {  // channels follow each other in the counter: no block is cut short
      draw_range(fill, stream, out, 0, fill.channels * fill.spatial);
    } else {
      for (int64_t channel = 0; channel < fill.channels; ++channel) {
        const int64_t offset = channel * fill.spatial;
        draw_range(fill, stream, out, offset + begin, offset + end);
      }
    }
  }
}

}  // namespace

void normal(const NormalFill& fill, int threads) {
  switch (fill.dtype) {
    case DType::kFloat32:
      return fill_tiles<float>(fill, threads);
    case DType::kBFloat16:
      return fill_tiles<BFloat16>(fill, threads);
    case DType::kFloat16:
      return fill_tiles<Float16>(fill, threads);
  }
}

void philox(uint32_t* out, int64_t quads, uint64_t seed, uint32_t step, uint64_t sample,
            uint32_t first_quad) {
#pragma omp simd
  for (int64_t i = 0; i < quads; ++i) {
    const Words4 words = philox_words(seed, step, sample, first_quad + static_cast<uint32_t>(i));
    for (int lane = 0; lane < 4; ++lane) out[4 * i + lane] = words.w[lane];
  }
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

// What the forward and the backward of group_norm_silu share on the GPU: a block's part of a slab
// (group_norm_tile.h), walks over it, and sums of its channels and groups.
#pragma once

#include <type_traits>

#include "../common/group_norm_silu.h"
#include "../common/lanes.h"
#include "../common/silu.h"
#include "device.h"
#include "group_norm_tile.h"
#include "launch.h"
#include "vec.h"

namespace fastdiff::cuda {

constexpr int kMostThreads = 256;  // of a block, of which two have registers on a multiprocessor

// One kernel for a resident slab; two where x is read twice.
enum class Pass { kWhole, kFirst, kSecond };

// How a kernel reads: T_ in memory, channels_last or planar, so many elements at a time.
template <typename T_, bool kLast_, int kVec_>
struct Access {
  using T = T_;
  using P = Pack<T_, kVec_>;
  static constexpr bool kLast = kLast_;
  static constexpr int kVec = kVec_;
  static constexpr int kChannels = kLast_ ? kVec_ : 1;  // of a pack
};

// A block's share. Its packs form rows: a channel's positions, or with channels_last a position's
// channels.
template <typename A>
struct Part {
  int64_t slab;  // of this launch
  int index;     // of the part in its slab
  int64_t sample;
  int64_t channel;   // the first one
  int64_t position;  // the first one
  int channels;
  int positions;
  int rows;
  int columns;
  int width;  // channels that it has of a group
  int groups;
  float count;        // its elements of a group
  int64_t first;      // pack of the first row, in memory
  int64_t row_packs;  // from one row to the next

  __device__ Part(const GroupNormShape& shape, const GroupNormTile& tile, int64_t first_slab) {
    slab = blockIdx.x / tile.parts;
    index = static_cast<int>(blockIdx.x - slab * tile.parts);
    sample = (first_slab + slab) / tile.slabs_of_sample;
    channel = (first_slab + slab - sample * tile.slabs_of_sample) * tile.slab_channels;
    const int channel_part = index / tile.position_parts;
    position = (index - channel_part * tile.position_parts) * tile.part_positions;
    channels = static_cast<int>(smaller(
        tile.part_channels, tile.slab_channels - int64_t{channel_part} * tile.part_channels));
    channel += int64_t{channel_part} * tile.part_channels;
    positions = static_cast<int>(smaller(tile.part_positions, shape.positions - position));
    width = static_cast<int>(smaller(tile.group_channels, channels));
    groups = channels / width;
    count = static_cast<float>(int64_t{width} * positions);
    rows = A::kLast ? positions : channels;
    columns = (A::kLast ? channels : positions) / A::kVec;
    row_packs = (A::kLast ? shape.channels : shape.positions) / A::kVec;
    first = A::kLast ? (sample * shape.positions + position) * row_packs + channel / A::kVec
                     : (sample * shape.channels + channel) * row_packs + position / A::kVec;
  }

  static __device__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  // Where a pack is in memory, and in what the block holds of it.
  __device__ int64_t pack(int row, int column) const {
    return first + static_cast<uint32_t>(row) * row_packs + column;
  }
  __device__ int place(int row, int column) const { return row * columns + column; }
  // Of the sample's group `group` of this part, among all samples' groups.
  __device__ int64_t statistic(const GroupNormShape& shape, const GroupNormTile& tile,
                               int group) const {
    return sample * shape.groups + channel / tile.group_channels + group;
  }
};

FASTDIFF_INLINE int64_t groups_of_slab(const GroupNormTile& tile) {
  return tile.slab_channels / tile.group_channels;
}

// --- Coefficients of a channel -------------------------------------------------------------------

__device__ __forceinline__ float coefficient(const void* values, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(values)[index];
    case DType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(values)[index]);
    default:
      return to_float(static_cast<const __half*>(values)[index]);
  }
}

struct Affine {
  float gain;
  float offset;
};

// v = x̂·gain + offset: weight and bias, then FiLM. Call is GroupNormForward or GroupNormBackward.
template <typename Call>
__device__ Affine affine(const GroupNormShape& shape, const Call& call, int64_t sample,
                         int64_t channel) {
  Affine result = {1.0f, 0.0f};
  if (call.weight != nullptr) {
    result.gain = coefficient(call.weight, shape.affine_dtype, channel);
    result.offset = coefficient(call.bias, shape.affine_dtype, channel);
  }
  if (call.scale != nullptr) {
    const float scale =
        1.0f + coefficient(call.scale, shape.film_dtype, sample * shape.scale_stride + channel);
    result.gain *= scale;
    result.offset = result.offset * scale + coefficient(call.shift, shape.film_dtype,
                                                        sample * shape.shift_stride + channel);
  }
  return result;
}

// What is added to the channel before the norm.
template <typename Call>
__device__ float embedding(const GroupNormShape& shape, const Call& call, int64_t sample,
                           int64_t channel) {
  return shape.add == Add::kEmbedding
             ? coefficient(call.add, shape.add_dtype, sample * shape.add_stride + channel)
             : 0.0f;
}

// A channel's coefficients as the elements meet them: v = (x − center)·gain + offset.
struct Normal {
  float center, gain, offset;
};

// Those of a part's channels, which begin the block's shared memory.
struct Normals {
  float* center;
  float* gain;
  float* offset;

  __device__ explicit Normals(int channels)
      : center(reinterpret_cast<float*>(shared_memory())),
        gain(center + channels),
        offset(gain + channels) {}

  __device__ Normal of(int c) const { return {center[c], gain[c], offset[c]}; }
};

// --- SiLU ----------------------------------------------------------------------------------------

// Results of 16 bits are rounded a hundred times more coarsely than the fast exponential is.
template <typename T>
__device__ __forceinline__ float silu_of(float v) {
  return v * (sizeof(T) == 2 ? fast_sigmoid(v) : sigmoid(v));
}
template <typename T>
__device__ __forceinline__ float silu_derivative_of(float v) {
  return silu_derivative(v, sizeof(T) == 2 ? fast_sigmoid(v) : sigmoid(v));
}

// Calls visit(std::true_type{}) or visit(std::false_type{}).
template <typename Visit>
__device__ __forceinline__ void with_flag(bool flag, const Visit& visit) {
  if (flag) {
    visit(std::true_type{});
  } else {
    visit(std::false_type{});
  }
}

// --- Walking over the part -----------------------------------------------------------------------

// x, and with kResidual what is added to it.
template <typename A, bool kResidual>
struct Input {
  using P = typename A::P;
  static constexpr int kTensors = kResidual ? 2 : 1;
  P* at[kTensors];

  __device__ Input(const void* x, const void* residual) {
    at[0] = static_cast<P*>(const_cast<void*>(x));
    if constexpr (kResidual) at[1] = static_cast<P*>(const_cast<void*>(residual));
  }

  struct Held {
    P pack[kTensors];
  };
  __device__ __forceinline__ Held load(int64_t pack) const {
    Held held;
#pragma unroll
    for (int t = 0; t < kTensors; ++t) held.pack[t] = at[t][pack];
    return held;
  }
  __device__ __forceinline__ Held load_last(int64_t pack) const {  // x is not read again
    Held held;
#pragma unroll
    for (int t = 0; t < kTensors; ++t) held.pack[t] = load_streaming(&at[t][pack]);
    return held;
  }
  __device__ __forceinline__ void store(const Held& held, int64_t pack) const {
#pragma unroll
    for (int t = 0; t < kTensors; ++t) at[t][pack] = held.pack[t];
  }
  __device__ __forceinline__ void values(const Held& held, float (&values)[A::kVec]) const {
    unpack(held.pack[0], values);
    if constexpr (kResidual) {
      float added[A::kVec];
      unpack(held.pack[1], added);
#pragma unroll
      for (int i = 0; i < A::kVec; ++i) values[i] += added[i];
    }
  }
};

// The last pass takes its input from what the block holds, or from memory for the second and last
// time; its result then leaves the L2 cache to what is still to be read.
template <bool kFromShared, typename A, typename From>
__device__ __forceinline__ auto fetch_again(const Part<A>& part, const From& from, int row,
                                            int column) {
  if constexpr (kFromShared) return from.load(part.place(row, column));
  return from.load_last(part.pack(row, column));
}

template <bool kFromShared, typename P>
__device__ __forceinline__ void store_result(P* to, const P& result) {
  if constexpr (kFromShared) {
    *to = result;
  } else {
    store_streaming(to, result);
  }
}

// fetch(i) and then use(what it gave, i) for i = first, first + step, ...; kBatch fetches are in
// flight together.
template <int kBatch, typename Fetch, typename Use>
__device__ __forceinline__ void batched(int first, int end, int step, const Fetch& fetch,
                                        const Use& use) {
  decltype(fetch(first)) held[kBatch];
  int i = first;
  for (; i + (kBatch - 1) * step < end; i += kBatch * step) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) held[b] = fetch(i + b * step);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) use(held[b], i + b * step);
  }
  if (i >= end) return;
#pragma unroll
  for (int b = 0; b < kBatch - 1; ++b) {
    if (i + b * step < end) held[b] = fetch(i + b * step);
  }
#pragma unroll
  for (int b = 0; b < kBatch - 1; ++b) {
    if (i + b * step < end) use(held[b], i + b * step);
  }
}

// For every pack of the part: body.fetch(row, column), then body.use(held, coefficients of its
// channels, row, column, sums). With kSums, `sums` goes through one team's share of a channel and
// ends in partials[(sum · teams + team) · channels + channel].
template <typename A, int kSums, int kBatch, typename Body>
__device__ __forceinline__ void for_each_pack(const Part<A>& part, const GroupNormTile& tile,
                                              const Body& body, float* partials) {
  constexpr int kKept = kSums > 0 ? kSums : 1;
  const int threads = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % tile.lanes;
  const int place = thread / tile.lanes;
  const int places = threads / tile.lanes;

  if constexpr (A::kLast) {
    const int team_threads = tile.lanes > kLanes ? tile.lanes : kLanes;
    for (int first = 0; first < part.columns; first += tile.lanes) {
      const int column = first + lane;
      float sums[kKept][A::kVec] = {};
      if (column < part.columns) {
        typename Body::Channel channels[A::kVec];
#pragma unroll
        for (int i = 0; i < A::kVec; ++i) channels[i] = body.channel(column * A::kVec + i);
        batched<kBatch>(
            place, part.rows, places, [&](int row) { return body.fetch(row, column); },
            [&](const auto& held, int row) { body.use(held, channels, row, column, sums); });
      }
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
#pragma unroll
        for (int i = 0; i < A::kVec; ++i) {
          const float sum = sum_of_lanes(sums[s][i], kLanes / 2, tile.lanes);
          if (column < part.columns && thread % team_threads < tile.lanes) {
            partials[(s * tile.teams + thread / team_threads) * part.channels + column * A::kVec +
                     i] = sum;
          }
        }
      }
    }
  } else {
    const int units = part.rows * tile.teams;
    for (int first = 0; first < units; first += places) {
      const int unit = first + place;
      const int team = tile.teams == 1 ? 0 : unit / part.rows;
      const int row = unit - team * part.rows;
      float sums[kKept][1] = {};
      if (unit < units) {
        const typename Body::Channel channels[1] = {body.channel(row)};
        batched<kBatch>(
            team * tile.lanes + lane, part.columns, tile.teams * tile.lanes,
            [&](int column) { return body.fetch(row, column); },
            [&](const auto& held, int column) { body.use(held, channels, row, column, sums); });
      }
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        const float sum = sum_of_lanes(sums[s][0], tile.lanes / 2, 1);
        if (unit < units && lane == 0) partials[s * units + unit] = sum;
      }
    }
  }
}

// --- Sums ----------------------------------------------------------------------------------------

// The sum of one group's partial sums number `s`, in every lane of the warp that asks.
template <typename A>
__device__ float sum_of_group(const Part<A>& part, const GroupNormTile& tile, const float* partials,
                              int s, int group) {
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x) % kLanes; i < tile.teams * part.width; i += kLanes) {
    const int team = i / part.width;
    const int channel = group * part.width + i - team * part.width;
    sum += partials[(s * tile.teams + team) * part.channels + channel];
  }
  return sum_of_lanes(sum);
}

// The blocks of a slab wait for each other.
__device__ __forceinline__ void sync_parts(const GroupNormTile& tile) {
  if (tile.parts > 1) {
    Cluster::sync();
  } else {
    __syncthreads();
  }
}

// --- Launching -----------------------------------------------------------------------------------

// Calls visit(Access<...>{}) with the access that a call's dtype, layout and tile name.
template <typename Visit>
void with_access(const GroupNormShape& shape, const GroupNormTile& tile, const Visit& visit) {
  with_type(shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (shape.channels_last) {
      if (tile.wide) return visit(Access<T, true, kWide<T>>{});
      return visit(Access<T, true, 1>{});
    }
    if (tile.wide) return visit(Access<T, false, kWide<T>>{});
    return visit(Access<T, false, 1>{});
  });
}

// Calls visit(first slab, slabs) for every launch: as few as slabs_at_once allows, none smaller than
// another by more than one slab.
template <typename Visit>
void for_each_launch(const GroupNormTile& tile, const Visit& visit) {
  int64_t first = 0;
  for (int64_t left = tile_detail::divided_up(tile.slabs, tile.slabs_at_once); left > 0; --left) {
    const int64_t slabs = (tile.slabs - first) / left;
    visit(first, slabs);
    first += slabs;
  }
}

// The launch of one pass over `slabs` slabs.
inline Launch launch_of(const char* name, const GroupNormTile& tile, int64_t slabs, bool cluster,
                        int64_t shared_bytes, void* stream) {
  Launch how = {name, dim3(static_cast<unsigned>(slabs * tile.parts)),
                static_cast<unsigned>(tile.threads), stream};
  how.shared_bytes = static_cast<size_t>(shared_bytes);
  how.cluster = cluster ? static_cast<unsigned>(tile.parts) : 1;
  return how;
}

}  // namespace fastdiff::cuda

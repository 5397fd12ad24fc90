// group_norm_silu, forward: y = silu(group_norm(x + add)·(1 + scale) + shift)
//
//   (common/group_norm_silu.h has the equation.) float32, bfloat16, float16; planar (N, C, positions) or
//   channels_last; any sizes; weight, bias, scale, shift and an embedding in dtypes of their own.
//
// Bytes moved: x once and y once where a slab fits into a cluster's shared memory, x twice where
// not, the second time mostly from L2. Floor for (64, 128, 64, 64) float32: 268 MB, 62 µs at the
// 4.3 TB/s of an H200.
//
// Algorithm, for the part of a slab that a block has (group_norm_tile.h):
//   1. x goes into shared memory, and its sum by groups; then the sums of the deviations from the
//      part's own mean, which correct that mean, and of their squares.
//   2. The parts' moments are merged (common/moments.h) over the cluster's shared memory, or over
//      global memory between two kernels, by every block in the same order.
//   3. y from shared memory, or from x again.
#include "group_norm_silu.h"

#include "../common/moments.h"
#include "group_norm.h"

namespace fastdiff::cuda {
namespace {

// Loads in flight of a thread; from shared memory few where it also has the coefficients of eight
// channels.
constexpr int kLoads = 4;
template <typename A>
constexpr int kBatch = A::kChannels == 8 ? 2 : 4;

// Shared memory in its order; as many floats as kForwardFloats says.
struct Shared : Normals {
  float* embedding;  // of each channel
  float* partials;
  Moments* moments;  // of each group
  unsigned char* held;

  template <typename A>
  __device__ Shared(const Part<A>& part, const GroupNormTile& tile) : Normals(part.channels) {
    embedding = offset + part.channels;
    partials = embedding + part.channels;
    moments =
        reinterpret_cast<Moments*>(partials + kForwardFloats.sum * tile.teams * part.channels);
    held = shared_memory() + tile.held_at;
  }
};

// x into shared memory, and its sum.
template <typename A, typename I>
struct Load {
  struct Channel {};
  const Part<A>& part;
  I from;
  I to;

  __device__ Channel channel(int) const { return {}; }
  __device__ auto fetch(int row, int column) const { return from.load(part.pack(row, column)); }
  template <typename Held, typename Sums>
  __device__ void use(const Held& held, const Channel*, int row, int column, Sums& sums) const {
    to.store(held, part.place(row, column));
    float x[A::kVec];
    from.values(held, x);
#pragma unroll
    for (int i = 0; i < A::kVec; ++i) sums[0][i % A::kChannels] += x[i];
  }
};

// The sums of the deviations from the part's mean and of their squares.
template <typename A, typename I>
struct Deviations {
  struct Channel {
    float center;
  };
  const Part<A>& part;
  const float* center;
  I from;

  __device__ Channel channel(int c) const { return {center[c]}; }
  __device__ auto fetch(int row, int column) const { return from.load(part.place(row, column)); }
  template <typename Held, typename Sums>
  __device__ void use(const Held& held, const Channel* channels, int, int, Sums& sums) const {
    float x[A::kVec];
    from.values(held, x);
#pragma unroll
    for (int i = 0; i < A::kVec; ++i) {
      const float deviation = x[i] - channels[i % A::kChannels].center;
      sums[0][i % A::kChannels] += deviation;
      sums[1][i % A::kChannels] += deviation * deviation;
    }
  }
};

// y = silu((x − center)·gain + offset)
template <typename A, typename I, bool kFromShared>
struct Normalise {
  using Channel = Normal;
  const Part<A>& part;
  const Normals& normals;
  I from;
  typename A::P* y;
  bool silu;

  __device__ Channel channel(int c) const { return normals.of(c); }
  __device__ auto fetch(int row, int column) const {
    return fetch_again<kFromShared>(part, from, row, column);
  }
  template <typename Held, typename Sums>
  __device__ void use(const Held& held, const Channel* channels, int row, int column, Sums&) const {
    float v[A::kVec];
    from.values(held, v);
#pragma unroll
    for (int i = 0; i < A::kVec; ++i) {
      const Channel& c = channels[i % A::kChannels];
      v[i] = (v[i] - c.center) * c.gain + c.offset;
    }
    if (silu) {
#pragma unroll
      for (int i = 0; i < A::kVec; ++i) v[i] = silu_of<typename A::T>(v[i]);
    }
    store_result<kFromShared>(&y[part.pack(row, column)], packed<typename A::T>(v));
  }
};

// Step 1: the moments of the part's own groups.
template <typename A, typename I>
__device__ void moments_of_part(const Part<A>& part, const GroupNormTile& tile,
                                const Shared& shared, const I& from, const I& held) {
  const float count = part.count;
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  const int warps = static_cast<int>(blockDim.x) / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;

  for_each_pack<A, 1, kLoads>(part, tile, Load<A, I>{part, from, held}, shared.partials);
  __syncthreads();
  for (int group = warp; group < part.groups; group += warps) {
    float* const center = shared.center + group * part.width;
    float embeddings = 0.0f;
    for (int i = lane; i < part.width; i += kLanes) embeddings -= center[i];
    const float mean = sum_of_group(part, tile, shared.partials, 0, group) / count +
                       sum_of_lanes(embeddings) / static_cast<float>(part.width);
    for (int i = lane; i < part.width; i += kLanes) center[i] += mean;
    if (lane == 0) shared.moments[group].mean = mean;
  }
  __syncthreads();
  for_each_pack<A, 2, kBatch<A>>(part, tile, Deviations<A, I>{part, shared.center, held},
                                 shared.partials);
  __syncthreads();
  for (int group = warp; group < part.groups; group += warps) {
    const float rest = sum_of_group(part, tile, shared.partials, 0, group);
    const float squares = sum_of_group(part, tile, shared.partials, 1, group);
    if (lane == 0) {
      Moments& moments = shared.moments[group];
      moments = {count, moments.mean + rest / count, squares - rest * rest / count};
    }
  }
}

// Step 2, by one warp: the moments of all parts, which of(part) gives, in every lane.
template <typename Of>
__device__ Moments merged(int parts, const Of& of) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  Moments mine = {};
  for (int part = lane; part < parts; part += kLanes) mine = merge(mine, of(part));
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const Moments other = {__shfl_xor_sync(kAllLanes, mine.count, distance),
                           __shfl_xor_sync(kAllLanes, mine.mean, distance),
                           __shfl_xor_sync(kAllLanes, mine.squares, distance)};
    mine = lane & distance ? merge(other, mine) : merge(mine, other);
  }
  return mine;
}

template <typename A, Pass kPass>
__global__ void __launch_bounds__(kMostThreads, 2)
    group_norm_silu_kernel(const GroupNormShape shape, const GroupNormForward call,
                           const GroupNormTile tile, int64_t first_slab, float* workspace) {
  using P = typename A::P;
  const Part<A> part(shape, tile, first_slab);
  const Shared shared(part, tile);
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const bool residual = shape.add == Add::kResidual;
  unsigned char* const held_add = shared.held + tile.held_bytes;

  for (int c = thread; c < part.channels; c += threads) {
    const Affine a = affine(shape, call, part.sample, part.channel + c);
    shared.gain[c] = a.gain;
    shared.offset[c] = a.offset;
    shared.embedding[c] = embedding(shape, call, part.sample, part.channel + c);
    shared.center[c] = -shared.embedding[c];
  }
  __syncthreads();
  // Of the slab, in the workspace: (parts, groups).
  Moments* const between =
      reinterpret_cast<Moments*>(workspace) + part.slab * tile.parts * part.groups;
  if constexpr (kPass != Pass::kSecond) {
    with_flag(residual, [&](auto flag) {
      using I = Input<A, flag.value>;
      moments_of_part(part, tile, shared, I(call.x, call.add), I(shared.held, held_add));
    });
    if constexpr (kPass == Pass::kFirst) {
      __syncthreads();
      for (int group = thread; group < part.groups; group += threads) {
        between[part.index * part.groups + group] = shared.moments[group];
      }
      return;
    }
    sync_parts(tile);
  }

  for (int group = thread / kLanes; group < part.groups; group += threads / kLanes) {
    const Moments moments = merged(tile.parts, [&](int other) {
      if constexpr (kPass == Pass::kSecond) return between[other * part.groups + group];
      return tile.parts == 1 ? shared.moments[group]
                             : *Cluster::of_block(&shared.moments[group], other);
    });
    const float rstd = 1.0f / sqrtf(moments.squares / moments.count + shape.eps);
    for (int i = thread % kLanes; i < part.width; i += kLanes) {
      const int c = group * part.width + i;
      shared.center[c] = moments.mean - shared.embedding[c];
      shared.gain[c] *= rstd;
    }
    if (part.index == 0 && thread % kLanes == 0 && call.mean != nullptr) {
      const int64_t statistic = part.statistic(shape, tile, group);
      call.mean[statistic] = moments.mean;
      call.rstd[statistic] = rstd;
    }
  }
  // The coefficients are there, and no block reads another's moments any more.
  if constexpr (kPass == Pass::kWhole) {
    sync_parts(tile);
  } else {
    __syncthreads();
  }
  constexpr bool kFromShared = kPass == Pass::kWhole;
  with_flag(residual, [&](auto flag) {
    using I = Input<A, flag.value>;
    const I from = kFromShared ? I(shared.held, held_add) : I(call.x, call.add);
    const Normalise<A, I, kFromShared> normalise = {part, shared, from, static_cast<P*>(call.y),
                                                    shape.silu};
    for_each_pack<A, 0, kBatch<A>>(part, tile, normalise, nullptr);
  });
}

}  // namespace

void group_norm_silu(const GroupNormShape& shape, const GroupNormForward& call,
                     const GroupNormTile& tile, float* workspace, void* stream) {
  const char* const name = "group_norm_silu";
  with_access(shape, tile, [&](auto access) {
    using A = decltype(access);
    for_each_launch(tile, [&](int64_t first, int64_t slabs) {
      if (tile.resident) {
        const Launch whole = launch_of(name, tile, slabs, true, tile.shared_bytes, stream);
        launch<group_norm_silu_kernel<A, Pass::kWhole>>(whole, shape, call, tile, first, workspace);
        return;
      }
      const Launch read = launch_of(name, tile, slabs, false, tile.shared_bytes, stream);
      launch<group_norm_silu_kernel<A, Pass::kFirst>>(read, shape, call, tile, first, workspace);
      const Launch apply = launch_of(name, tile, slabs, false, tile.held_at, stream);
      launch<group_norm_silu_kernel<A, Pass::kSecond>>(apply, shape, call, tile, first, workspace);
    });
  });
}

}  // namespace fastdiff::cuda

// What threads do together: shared memory, sums over lanes, clusters of blocks.
#pragma once

#include <cuda_runtime.h>
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FASTDIFF_CLUSTERS
#include <cooperative_groups.h>
#endif

namespace fastdiff::cuda {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// The block's dynamic shared memory.
__device__ __forceinline__ unsigned char* shared_memory() {
#ifdef FASTDIFF_EMULATION
  return static_cast<unsigned char*>(emulation::shared_memory());
#else
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
#endif
}

// The sum over the lanes whose numbers differ in the bits from `last` to `first` (powers of two), in
// each of them; all lanes of the warp call. The order of the additions is always the same.
__device__ __forceinline__ float sum_of_lanes(float value, int first = kLanes / 2, int last = 1) {
#pragma unroll
  for (int distance = kLanes / 2; distance >= 1; distance /= 2) {
    if (distance > first || distance < last) continue;
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// The blocks that share their memory; one alone on devices without clusters.
struct Cluster {
#ifdef FASTDIFF_CLUSTERS
  static __device__ __forceinline__ void sync() { cooperative_groups::this_cluster().sync(); }
  template <typename T>
  static __device__ __forceinline__ T* of_block(T* mine, unsigned rank) {
    return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
  }
#else
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  template <typename T>
  static __device__ __forceinline__ T* of_block(T* mine, unsigned) {
    return mine;
  }
#endif
};

}  // namespace fastdiff::cuda

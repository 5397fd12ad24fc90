// What launches on the current device can have. Clusters of 16 blocks are asked about, not assumed:
// they need 16 free multiprocessors that are neighbours, which parts of a GPU (MIG) may not have.
#include "device_limits.h"

#include <stdexcept>

#include "launch.h"

namespace fastdiff::cuda {
namespace {

constexpr int kLargestCluster = 16;
constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) probe_kernel() {}

bool holds_the_largest_clusters(int shared_bytes) {
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kLargestCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kLargestCluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  const bool known =
      cudaFuncSetAttribute(probe_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
          cudaSuccess &&
      cudaFuncSetAttribute(probe_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           shared_bytes) == cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&clusters, probe_kernel, &config) == cudaSuccess;
  cudaGetLastError();
  return known && clusters > 0;
}

}  // namespace

DeviceLimits device_limits(int device) {
  const auto of = [&](cudaDeviceAttr attribute) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
    return value;
  };
  const int shared_bytes = of(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  int cluster = 1;
  if (of(cudaDevAttrClusterLaunch)) {
    cluster = holds_the_largest_clusters(shared_bytes) ? kLargestCluster : kPortableCluster;
  }
  return {of(cudaDevAttrMultiProcessorCount), shared_bytes, cluster, of(cudaDevAttrL2CacheSize)};
}

}  // namespace fastdiff::cuda

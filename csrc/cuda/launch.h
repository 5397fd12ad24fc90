// Every kernel is launched here: checked, on the current device, in the caller's stream.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "device_limits.h"

namespace fastdiff::cuda {

struct Launch {
  const char* name;  // of the operation, for errors
  dim3 grid;
  unsigned threads;
  void* stream;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
};

constexpr size_t kSharedByDefault = 48 << 10;  // more has to be asked for

inline std::runtime_error launch_error(const Launch& how, cudaError_t error) {
  cudaGetLastError();  // otherwise the next call of anybody's would report it again
  std::string grid = std::to_string(how.grid.x);
  if (how.grid.y > 1) grid += " x " + std::to_string(how.grid.y);
  return std::runtime_error(std::string(how.name) + ": CUDA refused the launch of " + grid +
                            " blocks of " + std::to_string(how.threads) + " threads, clusters of " +
                            std::to_string(how.cluster) + " and " +
                            std::to_string(how.shared_bytes) +
                            " bytes of shared memory: " + cudaGetErrorString(error));
}

// What has to be asked for is asked once for each kernel and device; a smaller size would take back
// what another thread was granted, hence the lock.
template <auto kKernel>
void allow(const Launch& how) {
  struct Granted {
    size_t shared_bytes = kSharedByDefault;
    bool large_clusters = false;
  };
  static std::mutex one_at_a_time;
  static std::map<int, Granted> devices;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  Granted& granted = devices[device];
  if (error == cudaSuccess && how.shared_bytes > granted.shared_bytes) {
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(how.shared_bytes));
    if (error == cudaSuccess) granted.shared_bytes = how.shared_bytes;
  }
  if (error == cudaSuccess && how.cluster > kPortableCluster && !granted.large_clusters) {
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    granted.large_clusters = error == cudaSuccess;
  }
  if (error != cudaSuccess) throw launch_error(how, error);
}

// Throws std::runtime_error where CUDA does not accept the launch.
template <auto kKernel, typename... Arguments>
void launch(const Launch& how, const Arguments&... arguments) {
  if (how.shared_bytes > kSharedByDefault || how.cluster > kPortableCluster) allow<kKernel>(how);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = how.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = how.grid;
  config.blockDim = dim3(how.threads);
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = static_cast<cudaStream_t>(how.stream);
  config.attrs = &cluster;
  config.numAttrs = how.cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kKernel, arguments...);
  if (error != cudaSuccess) throw launch_error(how, error);
}

}  // namespace fastdiff::cuda

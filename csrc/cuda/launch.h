// Every kernel is launched here: checked, on the current device, in the caller's stream.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>

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
constexpr unsigned kPortableCluster = 8;
constexpr int kRememberedDevices = 64;

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

// What has to be asked for is asked once for each kernel and device.
template <auto kKernel>
void allow(const Launch& how) {
  static std::array<std::atomic<size_t>, kRememberedDevices> shared = {};
  static std::array<std::atomic<bool>, kRememberedDevices> large_cluster = {};
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const bool known = device < kRememberedDevices;
  if (error == cudaSuccess && how.shared_bytes > kSharedByDefault &&
      !(known && how.shared_bytes <= shared[device])) {
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(how.shared_bytes));
    if (error == cudaSuccess && known) shared[device] = how.shared_bytes;
  }
  if (error == cudaSuccess && how.cluster > kPortableCluster &&
      !(known && large_cluster[device])) {
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error == cudaSuccess && known) large_cluster[device] = true;
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

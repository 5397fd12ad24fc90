#include <cuda_runtime_api.h>

#include <stdexcept>

#include "kernels.h"

namespace fastdiff::cuda {

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

DeviceLimits device_limits(int device) {
  const auto of = [&](cudaDeviceAttr attribute) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
    return value;
  };
  // The chips of data centres hold clusters of 16 blocks where they are asked to; all promise 8.
  const int major = of(cudaDevAttrComputeCapabilityMajor);
  const int cluster = major == 9 || major == 10 ? 16 : 8;
  return {of(cudaDevAttrMultiProcessorCount), of(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          of(cudaDevAttrClusterLaunch) ? cluster : 1, of(cudaDevAttrL2CacheSize)};
}

}  // namespace fastdiff::cuda

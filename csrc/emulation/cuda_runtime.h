// The part of CUDA that csrc/cuda/ uses, on fibers (emulation.h).
#pragma once

#include <cmath>

#include "emulation.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// Of the fiber that runs; every launch waits for the one before.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// --- Vectors, and accesses with a cache hint: plain copies, counted, whose alignment UBSan checks ---

namespace fastdiff::emulation {
struct Traffic {
  uint64_t loaded, stored;  // bytes
};
inline Traffic traffic = {};
}  // namespace fastdiff::emulation

struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

template <typename T>
inline T __ldcs(const T* address) {
  fastdiff::emulation::traffic.loaded += sizeof(T);
  return *address;
}
template <typename T>
inline void __stcs(T* address, T value) {
  fastdiff::emulation::traffic.stored += sizeof(T);
  *address = value;
}

// --- Arithmetic: the exact functions in place of approximate instructions --------------------------

inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }

// --- Threads together ------------------------------------------------------------------------------

inline void __syncthreads() { fastdiff::emulation::sync_block(); }

template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int lanes) {
  const unsigned from = fastdiff::emulation::current().lane ^ static_cast<unsigned>(lanes);
  fastdiff::emulation::exchange(&value, sizeof value, from);
  return value;
}

// --- Launching -------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = void*;

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};

namespace fastdiff::emulation {
// What the attributes of a kernel allow, and the last error's words.
cudaError_t allow(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config,
                   const std::function<void()>& body);
}  // namespace fastdiff::emulation

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return fastdiff::emulation::allow(reinterpret_cast<const void*>(kernel), attribute, value);
}

// The arguments are copied, as a launch copies them.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  return fastdiff::emulation::launch(reinterpret_cast<const void*>(kernel), *config,
                                     [=] { kernel(arguments...); });
}

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// Just enough of CUDA to compile a kernel of csrc/cuda/ as plain C++ and run it on the CPU, one
// thread after another. It serves kernels whose threads do not talk to each other; it proves
// indexing and arithmetic, not timing or races.
#pragma once

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  unsigned long dynamicSmemBytes;
  cudaStream_t stream;
};

// The grid's size, when positive, is cut to this in x and y: kernels must stride, not assume.
inline unsigned emulated_grid_limit = 0;

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (gridDim.x == 0 || gridDim.y == 0 || blockDim.x > 1024) return cudaErrorInvalidValue;
  if (emulated_grid_limit > 0) {
    gridDim.x = gridDim.x < emulated_grid_limit ? gridDim.x : emulated_grid_limit;
    gridDim.y = gridDim.y < emulated_grid_limit ? gridDim.y : emulated_grid_limit;
  }
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
      for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(arguments...);
    }
  }
  return cudaSuccess;
}

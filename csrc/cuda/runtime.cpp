#include "runtime.h"

#include <cuda_runtime_api.h>

namespace fastdiff::cuda {

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace fastdiff::cuda

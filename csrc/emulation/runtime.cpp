// In place of csrc/cuda/runtime.cpp: no CUDA is linked, and no driver asked.
#include "../cuda/kernels.h"

namespace fastdiff::cuda {

int runtime_version() { return 0; }
int driver_version() { return 0; }

}  // namespace fastdiff::cuda

// In place of csrc/cuda/runtime.cpp and device_limits.cu: no CUDA is linked, and no driver asked.
#include "../cuda/runtime.h"

#include "../cuda/device_limits.h"
#include "emulation.h"

namespace fastdiff::cuda {

DeviceLimits device_limits(int) {
  return {emulation::device.multiprocessors, emulation::device.shared_bytes,
          emulation::device.cluster, emulation::device.l2_bytes};
}
int runtime_version() { return 0; }
int driver_version() { return 0; }

}  // namespace fastdiff::cuda

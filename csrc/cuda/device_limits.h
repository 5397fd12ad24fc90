// What of a GPU plans and launches rest on.
#pragma once

#include <cstdint>

namespace fastdiff::cuda {

constexpr int kAccessBytes = 16;  // the most that one load or store moves
constexpr int kSectorBytes = 32;  // the least that memory gives
constexpr int kLineBytes = 128;
constexpr int64_t kPortableCluster = 8;  // blocks; larger clusters have to be asked for

struct DeviceLimits {
  int64_t multiprocessors;
  int64_t shared_bytes;  // of one block, when asked for
  int64_t cluster;       // blocks; 1: the device has no clusters
  int64_t l2_bytes;
};

DeviceLimits device_limits(int device);  // the current one

}  // namespace fastdiff::cuda

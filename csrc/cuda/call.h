// What launchers are handed besides an operation's own arguments. They launch on the current device,
// which the caller has set to the pointers' own, and throw std::runtime_error where CUDA does not
// accept a launch.
#pragma once

#include <cstdint>

namespace fastdiff::cuda {

// Device addresses that override a call's values when not null, so that a captured graph draws fresh
// noise at every replay: 8 bytes each (of a step the low 32 bits count).
struct DeviceCounters {
  const uint64_t* seed;
  const int64_t* step;
  const uint64_t* first_sample;
};

// Where a launch goes: the current device's multiprocessors, and a stream of its.
struct Target {
  int multiprocessors;
  void* stream;
};

}  // namespace fastdiff::cuda

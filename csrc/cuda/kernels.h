// The CUDA launchers. No torch header: raw device pointers, sizes and a stream. They launch on the
// current device, which the caller has set to the pointers' own, and throw std::runtime_error where
// CUDA does not accept a launch.
#pragma once

#include <cstdint>

#include "../common/elementwise.h"
#include "../common/normal_fill.h"
#include "group_norm_tile.h"

namespace fastdiff::cuda {

// Device addresses that override the values of NormalFill when not null, so that a captured graph
// draws fresh noise at every replay: 8 bytes each (of a step the low 32 bits count).
struct DeviceCounters {
  const uint64_t* seed;
  const int64_t* step;
  const uint64_t* first_sample;
};

void normal(const NormalFill& fill, const DeviceCounters& counters, void* stream);
void philox(uint32_t* out, int64_t quads, uint64_t seed, uint32_t step, uint64_t sample,
            uint32_t first_quad, void* stream);

// workspace: tile.workspace_floats of them.
void group_norm_silu(const GroupNormShape& shape, const GroupNormForward& call,
                     const GroupNormTile& tile, float* workspace, void* stream);
void group_norm_silu_backward(const GroupNormShape& shape, const GroupNormBackward& call,
                              const GroupNormTile& tile, float* workspace, void* stream);

// Where a launch goes: the current device's multiprocessors, and a stream of its.
struct Target {
  int multiprocessors;
  void* stream;
};

// What `counters` gives takes the place of the call's seed and first sample, and is added to its
// step. A t out of range gives NaN.
void q_sample(const QSample& plan, const QSampleCall& call, const DeviceCounters& counters,
              const Target& on);
// The addresses override the call's seed and first sample. A step out of range gives NaN.
void posterior_step(const PosteriorStep& plan, const PosteriorStepCall& call,
                    const uint64_t* seed_address, const uint64_t* first_sample_address,
                    const Target& on);

DeviceLimits device_limits(int device);  // the current one
int runtime_version();  // as 1000·major + 10·minor, of the linked CUDA runtime; 0: emulated
int driver_version();   // the newest CUDA the driver serves; 0 without a driver

}  // namespace fastdiff::cuda

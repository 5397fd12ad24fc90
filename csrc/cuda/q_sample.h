#pragma once

#include "../common/q_sample.h"
#include "call.h"

namespace fastdiff::cuda {

// What `counters` gives takes the place of the call's seed and first sample, and is added to its
// step. A t out of range gives NaN.
void q_sample(const QSample& plan, const QSampleCall& call, const DeviceCounters& counters,
              const Target& on);

}  // namespace fastdiff::cuda

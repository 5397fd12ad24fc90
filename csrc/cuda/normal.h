#pragma once

#include <cstdint>

#include "../common/normal.h"
#include "call.h"

namespace fastdiff::cuda {

void normal(const NormalFill& fill, const DeviceCounters& counters, bool exact, void* stream);
void philox(uint32_t* out, int64_t quads, uint64_t seed, uint32_t step, uint64_t sample,
            uint32_t first_quad, void* stream);

}  // namespace fastdiff::cuda

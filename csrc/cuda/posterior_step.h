#pragma once

#include <cstdint>

#include "../common/posterior_step.h"
#include "call.h"

namespace fastdiff::cuda {

// The addresses override the call's seed and first sample. A step out of range gives NaN.
void posterior_step(const PosteriorStep& plan, const PosteriorStepCall& call,
                    const uint64_t* seed_address, const uint64_t* first_sample_address,
                    const Target& on);

}  // namespace fastdiff::cuda

#pragma once

#include <cstdint>

#include "../common/posterior_step.h"
#include "isa.h"

namespace fastdiff::cpu {

// false, before anything is written, for a step out of range.
FASTDIFF_KERNEL(posterior_step,
                bool(const PosteriorStep& plan, const PosteriorStepCall& call, int threads));

}  // namespace fastdiff::cpu

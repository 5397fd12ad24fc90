#pragma once

#include <cstdint>

#include "../common/rms_norm_silu.h"
#include "isa.h"

namespace fastdiff::cpu {

// Returns the floats of workspace that the call needs, and only counts with a null workspace.
FASTDIFF_KERNEL(rms_norm_silu, int64_t(const RmsNormShape& shape, const RmsNormCall& call,
                                       float* workspace, int threads));

}  // namespace fastdiff::cpu

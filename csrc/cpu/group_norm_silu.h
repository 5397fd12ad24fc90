#pragma once

#include <cstdint>

#include "../common/group_norm_silu.h"
#include "isa.h"

namespace fastdiff::cpu {

// Both return the floats of workspace that the call needs, and only count with a null workspace.
FASTDIFF_KERNEL(group_norm_silu, int64_t(const GroupNormShape& shape, const GroupNormForward& call,
                                         float* workspace, int threads));
FASTDIFF_KERNEL(group_norm_silu_backward,
                int64_t(const GroupNormShape& shape, const GroupNormBackward& call,
                        float* workspace, int threads));

}  // namespace fastdiff::cpu

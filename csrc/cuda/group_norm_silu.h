#pragma once

#include "../common/group_norm_silu.h"
#include "group_norm_tile.h"

namespace fastdiff::cuda {

// workspace: tile.workspace_floats of them.
void group_norm_silu(const GroupNormShape& shape, const GroupNormForward& call,
                     const GroupNormTile& tile, float* workspace, void* stream);
void group_norm_silu_backward(const GroupNormShape& shape, const GroupNormBackward& call,
                              const GroupNormTile& tile, float* workspace, void* stream);

}  // namespace fastdiff::cuda

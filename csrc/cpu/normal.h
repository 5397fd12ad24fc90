#pragma once

#include <cstdint>

#include "../common/normal.h"
#include "isa.h"

namespace fastdiff::cpu {

FASTDIFF_KERNEL(normal, void(const NormalFill& fill, int threads));
FASTDIFF_KERNEL(philox, void(uint32_t* out, int64_t quads, uint64_t seed, uint32_t step,
                             uint64_t sample, uint32_t first_quad));

}  // namespace fastdiff::cpu

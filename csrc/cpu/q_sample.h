#pragma once

#include <cstdint>

#include "../common/q_sample.h"
#include "isa.h"

namespace fastdiff::cpu {

// -1, or before anything is written the first sample whose t is out of range.
FASTDIFF_KERNEL(q_sample, int64_t(const QSample& plan, const QSampleCall& call, int threads));

}  // namespace fastdiff::cpu

#pragma once

#include <cstdint>

#include "../common/attention.h"
#include "isa.h"

namespace fastdiff::cpu {

FASTDIFF_KERNEL(attention_workspace,
                int64_t(const Attention& attention, bool for_backward, int threads));  // floats
FASTDIFF_KERNEL(attention_forward, void(const Attention& attention, int threads));
FASTDIFF_KERNEL(attention_backward, void(const Attention& attention, int threads));

}  // namespace fastdiff::cpu

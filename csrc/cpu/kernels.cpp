// The kernels of one instruction set; compiled once for each.
#include "kernels.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

const Kernels kernels = {
    normal,   philox,         group_norm_silu,     group_norm_silu_backward, rms_norm_silu,
    q_sample, posterior_step, attention_workspace, attention_forward,        attention_backward,
};

}  // namespace fastdiff::cpu::FASTDIFF_ISA

// The kernels of one instruction set; compiled once for each.
#include "kernels.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

const Kernels kernels = {normal, philox, attention_workspace, attention_forward, attention_backward};

}  // namespace fastdiff::cpu::FASTDIFF_ISA

#pragma once

#include <cstdint>

#include "../common/convolution.h"
#include "isa.h"

namespace fastdiff::cpu {

// Of a convolution of x alone. Returns the floats of workspace that the call needs, and only counts
// with a null workspace.
FASTDIFF_KERNEL(convolution_weight_gradient,
                int64_t(const ConvolutionShape& shape, const ConvolutionWeightGradientCall& call,
                        float* workspace, int threads));

}  // namespace fastdiff::cpu

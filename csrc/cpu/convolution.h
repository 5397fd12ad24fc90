#pragma once

#include <cstdint>

#include "../common/convolution.h"
#include "isa.h"

namespace fastdiff::cpu {

// Whether this CPU, and this build for it, makes such products.
FASTDIFF_KERNEL(convolution_serves, bool(Products products));

// Whether it does, and these are faster than products of float32.
FASTDIFF_KERNEL(convolution_pays, bool(Products products));

// Bytes of a packed weight, which starts at a multiple of 64.
FASTDIFF_KERNEL(convolution_panels, int64_t(Products products, int64_t out_channels,
                                            int64_t channels, int64_t taps));

// A float32 weight into panels.
FASTDIFF_KERNEL(pack_convolution, void(Products products, const ConvolutionWeight& weight,
                                       void* panels, int threads));

// Returns the floats of workspace that the call needs, and only counts with a null workspace.
FASTDIFF_KERNEL(convolution, int64_t(const ConvolutionShape& shape, const ConvolutionCall& call,
                                     float* workspace, int threads));

}  // namespace fastdiff::cpu

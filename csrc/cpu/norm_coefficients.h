#pragma once

#include "../common/norm_coefficients.h"
#include "isa.h"

namespace fastdiff::cpu {

FASTDIFF_KERNEL(norm_coefficients,
                void(const NormCoefficientsShape& shape, const NormCoefficientsCall& call));

}  // namespace fastdiff::cpu

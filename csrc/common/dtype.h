// The storage types of every kernel; fastdiff/ops/native.py has the same codes.
#pragma once

#include "lanes.h"

namespace fastdiff {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

FASTDIFF_INLINE int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace fastdiff

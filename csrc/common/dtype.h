// The storage types of every kernel; fastdiff/native.py has the same codes.
#pragma once

namespace fastdiff {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace fastdiff

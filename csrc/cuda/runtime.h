#pragma once

namespace fastdiff::cuda {

int runtime_version();  // as 1000·major + 10·minor, of the linked CUDA runtime; 0: emulated
int driver_version();   // the newest CUDA the driver serves; 0 without a driver

}  // namespace fastdiff::cuda

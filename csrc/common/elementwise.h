// The operands of the elementwise kernels, on any device.
//
// Every operand's sample is a (channels, spatial) array, the same for all of them, whose element
// (c, s) has index c·spatial + s in the noise's counter and stands at sample·i + channel·c +
// spatial·s, in elements of its own dtype. Contiguous samples are one channel.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastdiff {

struct Shape {
  int64_t samples;
  int64_t channels;
  int64_t spatial;
};

struct Layout {
  DType dtype;
  int64_t sample;
  int64_t channel;
  int64_t spatial;
};

}  // namespace fastdiff

// The mean and the sum of squared deviations of some numbers, and those of two sets together
// (Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1).
#pragma once

#include "lanes.h"

namespace fastdiff {

struct Moments {
  float count;
  float mean;
  float squares;  // Σ (x − mean)²
};

FASTDIFF_INLINE Moments merge(const Moments& a, const Moments& b) {
  const float count = a.count + b.count;
  const float share = count > 0.0f ? b.count / count : 0.0f;
  const float delta = b.mean - a.mean;
  return {count, a.mean + delta * share, a.squares + b.squares + delta * delta * a.count * share};
}

}  // namespace fastdiff

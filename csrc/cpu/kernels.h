// The CPU kernels. Each source of a kernel is compiled once per instruction set with
// FASTDIFF_ISA naming its namespace; isa.cpp picks one table at run time.
#pragma once

#include <cstdint>

#include "../common/attention.h"
#include "../common/elementwise.h"
#include "../common/group_norm.h"
#include "../common/normal_fill.h"
#include "../common/rms_norm.h"

namespace fastdiff::cpu {

// These return the floats of workspace that the call needs, and only count with a null workspace.
using GroupNormForwardKernel = int64_t(const GroupNormShape& shape, const GroupNormForward& call,
                                       float* workspace, int threads);
using GroupNormBackwardKernel = int64_t(const GroupNormShape& shape, const GroupNormBackward& call,
                                        float* workspace, int threads);
using RmsNormKernel = int64_t(const RmsNormShape& shape, const RmsNormCall& call, float* workspace,
                              int threads);

struct Kernels {
  void (*normal)(const NormalFill& fill, int threads);
  void (*philox)(uint32_t* out, int64_t quads, uint64_t seed, uint32_t step, uint64_t sample,
                 uint32_t first_quad);
  GroupNormForwardKernel* group_norm_silu;
  GroupNormBackwardKernel* group_norm_silu_backward;
  RmsNormKernel* rms_norm_silu;
  // -1, or before anything is written the first sample whose t is out of range
  int64_t (*q_sample)(const QSample& plan, const QSampleCall& call, int threads);
  // false, before anything is written, for a step out of range
  bool (*posterior_step)(const PosteriorStep& plan, const PosteriorStepCall& call, int threads);
  int64_t (*attention_workspace)(const Attention& attention, bool for_backward, int threads);
  void (*attention_forward)(const Attention& attention, int threads);
  void (*attention_backward)(const Attention& attention, int threads);
};

#ifdef FASTDIFF_ISA
namespace FASTDIFF_ISA {
void normal(const NormalFill& fill, int threads);
void philox(uint32_t* out, int64_t quads, uint64_t seed, uint32_t step, uint64_t sample,
            uint32_t first_quad);
GroupNormForwardKernel group_norm_silu;
GroupNormBackwardKernel group_norm_silu_backward;
RmsNormKernel rms_norm_silu;
int64_t q_sample(const QSample& plan, const QSampleCall& call, int threads);
bool posterior_step(const PosteriorStep& plan, const PosteriorStepCall& call, int threads);
int64_t attention_workspace(const Attention& attention, bool for_backward, int threads);  // floats
void attention_forward(const Attention& attention, int threads);
void attention_backward(const Attention& attention, int threads);
}  // namespace FASTDIFF_ISA
#endif

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace fastdiff::cpu

// posterior_step: one sampler step from one row of a step table (common/step.h) in one pass.
//
// Layouts: any strides (common/elementwise.h), each operand its own; float32, bfloat16, float16,
// arithmetic float32. Bytes moved with drawn noise: x_t, the network's output and x_prev, three
// passes; one more each for a learned variance, guidance, a given noise, a previous x_start, and
// x_start returned. Floor for (64, 3, 256, 256) float32, three passes: 151 MB, 35.1 µs at the
// 4.3 TB/s of an H200.
//
// Algorithm: elementwise.h's: load eight elements of what the row uses, draw their noise where it
// adds some, and combine. The row, its number, the seed, the first sample's number and the
// guidance scale are read from the device. Range: element indices below 2^34 where noise is drawn. A
// step out of range gives NaN.
#include "posterior_step.h"

#include "../common/step.h"
#include "elementwise.h"

namespace fastdiff::cuda {
namespace {

struct PosteriorOp {
  enum Input { kXt, kOutput, kUnconditional, kVariance, kNoise, kBefore, kInputs };
  enum Output { kXPrev, kXStart, kOutputs };
  static constexpr int kBlocks = 5;

  struct Start : cuda::Start {
    StepRow row;
    float guidance;
  };
  struct Row {};  // the same for every sample

  PosteriorStepCall call;
  int64_t rows;
  const uint64_t* seed_address;  // overrides the call's
  unsigned given;                // the inputs that there are

  __device__ __forceinline__ int64_t index() const {
    if (call.step_address == nullptr) return call.step;
    return call.step_is_wide ? *static_cast<const int64_t*>(call.step_address)
                             : *static_cast<const int32_t*>(call.step_address);
  }

  // Only what the row uses is read, and noise is drawn only for a row that adds some.
  __device__ __forceinline__ Start start() const {
    Start start;
    const int64_t i = index();
    start.row = i < 0 || i >= rows ? StepRow{NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN}
                                   : step_row(call.table, i);
    start.guidance = call.guidance_address != nullptr ? *call.guidance_address : call.guidance;
    const bool noisy = start.row.sigma != 0.0f;
    start.draws = noisy && call.draws;
    start.reads = given;
    if (!noisy) start.reads &= ~(1u << kNoise | 1u << kVariance);
    if (start.row.e == 0.0f) start.reads &= ~(1u << kBefore);
    start.seed = seed_address != nullptr ? *seed_address : call.seed;
    start.counter_step = call.first_step + static_cast<uint32_t>(i);
    return start;
  }

  __device__ __forceinline__ Row row(const Start&, int64_t) const { return {}; }

  template <int kCount>
  __device__ __forceinline__ void apply(const Start& start, const Row&,
                                        const float (&in)[kInputs][kCount],
                                        float (&out)[kOutputs][kCount]) const {
    using L = Lanes<float>;
    const StepRow& row = start.row;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float output = in[kOutput][i];
      if (start.has(kUnconditional)) output = guide(output, in[kUnconditional][i], start.guidance);
      const float x0 = predicted_x_start(row, in[kXt][i], output);
      float x_prev = mean_of_step(row, x0, in[kXt][i], output);
      if (start.has(kBefore)) x_prev = add_term(x_prev, row.e, in[kBefore][i]);
      if (start.draws || start.has(kNoise)) {
        const float std = start.has(kVariance) ? learned_std(row, in[kVariance][i]) : row.sigma;
        x_prev = L::fma(std, in[kNoise][i], x_prev);
      }
      out[kXPrev][i] = x_prev;
      out[kXStart][i] = x0;
    }
  }
};

}  // namespace

void posterior_step(const PosteriorStep& plan, const PosteriorStepCall& call,
                    const uint64_t* seed_address, const uint64_t* first_sample_address,
                    const Target& on) {
  using Op = PosteriorOp;
  const int64_t guidance = plan.guidance_offset, variance = plan.variance_offset;
  Work<Op> work = {};
  work.shape = plan.shape;
  work.in[Op::kXt] = operand(call.x_t, plan.x_t);
  work.in[Op::kOutput] = operand(call.output, plan.output);
  work.in[Op::kUnconditional] = operand(call.output, plan.output, guidance, guidance >= 0);
  work.in[Op::kVariance] = operand(call.output, plan.output, variance, variance >= 0);
  work.in[Op::kNoise] = operand(call.noise, plan.noise, 0, !call.draws);
  work.in[Op::kBefore] = operand(call.prev_x_start, plan.prev_x_start);
  work.out[Op::kXPrev] = operand(call.x_prev, plan.x_prev);
  work.out[Op::kXStart] = operand(call.x_start, plan.x_start);
  work.drawn_as = DType::kFloat32;
  work.draws = call.draws;
  work.first_sample = call.first_sample;
  work.first_sample_address = first_sample_address;

  unsigned given = 0;
  for (int i = 0; i < Op::kInputs; ++i) given |= (work.in[i].at != nullptr ? 1u : 0u) << i;
  work.op = {call, plan.rows, seed_address, given};
  run("posterior_step", work, on);
}

}  // namespace fastdiff::cuda

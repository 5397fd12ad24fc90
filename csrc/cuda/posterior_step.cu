// posterior_step: one sampler step from one row of a step table (common/step.h) in one pass.
//
// Layouts: any strides (common/elementwise.h), each operand its own; float32, bfloat16, float16,
// arithmetic float32. Bytes moved with drawn noise: x_t, the network's output and x_prev, three
// passes; one more each for a learned variance, guidance, a given noise, a previous x_start, and
// x_start returned. Floor for (64, 3, 256, 256) float32, three passes: 151 MB, 35.1 µs at the
// 4.3 TB/s of an H200.
//
// Algorithm: elementwise.h's: load a thread's elements of what the row uses, draw their noise
// where it adds some, and combine. The row, its number, the seed, the first sample's number and the
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
  static constexpr bool kRoundsNoise = false;

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
    start.row = i < 0 || i >= rows ? StepRow{NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN}
                                   : step_row(call.table, i);
    start.guidance = call.guidance_address != nullptr ? *call.guidance_address : call.guidance;
    const bool noisy = start.row.sigma != 0.0f;
    start.draws = noisy && call.draws;
    start.reads = given;
    if (!noisy) start.reads &= ~(1u << kNoise | 1u << kVariance);
    if (start.row.e0 == 0.0f) start.reads &= ~(1u << kBefore);
    start.seed = seed_address != nullptr ? *seed_address : call.seed;
    start.counter_step = call.first_step + static_cast<uint32_t>(i);
    return start;
  }

  __device__ __forceinline__ Row row(const Start&, int64_t) const { return {}; }

  // What the row does not use costs a branch for all elements.
  template <int kCount, typename Read>
  __device__ __forceinline__ void apply(const Start& start, const Row&, const Read& read,
                                        const float (&noise)[kCount],
                                        float (&out)[kOutputs][kCount]) const {
    using L = Lanes<float>;
    const StepRow& row = start.row;
    float x_t[kCount], output[kCount], other[kCount];
    read(kXt, x_t);
    read(kOutput, output);
    if (start.has(kUnconditional)) {
      read(kUnconditional, other);
#pragma unroll
      for (int i = 0; i < kCount; ++i) output[i] = guide(output[i], other[i], start.guidance);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      out[kXStart][i] = predicted_x_start(row, x_t[i], output[i]);
      out[kXPrev][i] = mean_of_step(row, out[kXStart][i], x_t[i], output[i]);
    }
    if (start.has(kBefore)) {
      read(kBefore, other);
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[kXPrev][i] = add_term(out[kXPrev][i], row.e0, other[i]);
    }
    if (!start.draws && !start.has(kNoise)) return;
    if (start.has(kVariance)) {
      read(kVariance, other);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        out[kXPrev][i] = L::fma(learned_std(row, other[i]), noise[i], out[kXPrev][i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[kXPrev][i] = L::fma(row.sigma, noise[i], out[kXPrev][i]);
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
  work.draws = call.draws;
  work.first_sample = call.first_sample;
  work.first_sample_address = first_sample_address;

  unsigned given = 0;
  for (int i = 0; i < Op::kInputs; ++i) given |= (work.in[i].at != nullptr ? 1u : 0u) << i;
  work.op = {call, plan.rows, seed_address, given};
  run("posterior_step", work, on);
}

}  // namespace fastdiff::cuda

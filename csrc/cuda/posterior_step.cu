// posterior_step: one sampler step from one row of a step table (common/step.h) in one pass.
//
// Layouts: any strides (common/elementwise.h), each operand its own; float32, bfloat16, float16,
// arithmetic float32. Bytes moved with drawn noise: x_t, the network's output and x_prev, three
// passes; one more each for a learned variance, guidance, a given noise, every slot of memory that
// the row reads or writes, and x_start returned. Floor for (64, 3, 256, 256) float32, three passes: 151 MB, 35.1 µs at the
// 4.3 TB/s of an H200.
//
// Algorithm: elementwise.h's: load a thread's elements of what the row uses, draw their noise
// where it adds some, and combine. The row, its number, the seed, the first sample's number, the
// guidance scale and the samples' output scales are read from the device. Memory is written by the
// thread that has read it. Range: element indices below 2^34 where noise is drawn. A step out of
// range gives NaN, and writes no memory.
#include "posterior_step.h"

#include "../common/step.h"
#include "elementwise.h"

namespace fastdiff::cuda {
namespace {

constexpr StepRow kNoRow = {NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN,
                            NAN, NAN, NAN, NAN, NAN, NAN, NAN};

// kKeeps: with memory that is written, and scales of the samples' outputs, which take registers; else
// without the scales, and of memory the first slot is read at most.
template <bool kKeeps>
struct PosteriorOp {
  enum Input { kXt, kOutput, kUnconditional, kVariance, kNoise, kMemory };
  enum Output { kXPrev, kXStart, kKept };
  static constexpr int kHeld = kKeeps ? kSlots : 1;
  static constexpr int kInputs = kMemory + kHeld;
  static constexpr int kOutputs = kKept + (kKeeps ? kSlots : 0);
  static constexpr int kBlocks = kKeeps ? 4 : 5;
  static constexpr bool kRoundsNoise = false;

  struct Start : cuda::Start {
    StepRow row;
    float guidance;
  };
  struct Row {
    float output_scale;
  };

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
    start.row = i < 0 || i >= rows ? kNoRow : step_row(call.table, i);
    start.guidance = call.guidance_address != nullptr ? *call.guidance_address : call.guidance;
    const bool noisy = start.row.sigma != 0.0f;
    start.draws = noisy && call.draws;
    start.reads = given;
    if (!noisy) start.reads &= ~(1u << kNoise | 1u << kVariance);
#pragma unroll
    for (int slot = 0; slot < kHeld; ++slot) {
      if (memory_factor(start.row, slot) == 0.0f) start.reads &= ~(1u << (kMemory + slot));
    }
    start.seed = seed_address != nullptr ? *seed_address : call.seed;
    start.counter_step = call.first_step + static_cast<uint32_t>(i);
    return start;
  }

  __device__ __forceinline__ Row row(const Start&, int64_t sample) const {
    return {kKeeps && call.output_scale != nullptr ? call.output_scale[sample] : 1.0f};
  }

  __device__ __forceinline__ bool writes(const Start& start, int output) const {
    return output < kKept || start.row.slot == static_cast<float>(output - kKept);
  }

  // What the row does not use costs a branch for all elements.
  template <int kCount, typename Read>
  __device__ __forceinline__ void apply(const Start& start, const Row& sample, const Read& read,
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
    if constexpr (kKeeps) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) output[i] = L::mul(sample.output_scale, output[i]);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      out[kXStart][i] = predicted_x_start(row, x_t[i], output[i]);
      out[kXPrev][i] = mean_of_step(row, out[kXStart][i], x_t[i], output[i]);
    }
#pragma unroll
    for (int slot = 0; slot < kHeld; ++slot) {
      if (!start.has(kMemory + slot)) continue;
      const float factor = memory_factor(row, slot);
      read(kMemory + slot, other);
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[kXPrev][i] = add_term(out[kXPrev][i], factor, other[i]);
    }
#pragma unroll
    for (int to = kKept; to < kOutputs; ++to) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[to][i] = kept_of_step(row, out[kXStart][i], x_t[i]);
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

template <bool kKeeps>
void run_op(const PosteriorStep& plan, const PosteriorStepCall& call, const uint64_t* seed_address,
         const uint64_t* first_sample_address, const Target& on) {
  using Op = PosteriorOp<kKeeps>;
  const int64_t guidance = plan.guidance_offset, variance = plan.variance_offset;
  Work<Op> work = {};
  work.shape = plan.shape;
  work.in[Op::kXt] = operand(call.x_t, plan.x_t);
  work.in[Op::kOutput] = operand(call.output, plan.output);
  work.in[Op::kUnconditional] =
      call.unconditional != nullptr
          ? operand(call.unconditional, plan.unconditional)
          : operand(call.output, plan.output, guidance, guidance >= 0);
  work.in[Op::kVariance] = operand(call.output, plan.output, variance, variance >= 0);
  work.in[Op::kNoise] = operand(call.noise, plan.noise, 0, !call.draws);
  for (int slot = 0; slot < Op::kHeld; ++slot) {
    work.in[Op::kMemory + slot] = operand(call.memory[slot], plan.memory[slot]);
  }
  work.out[Op::kXPrev] = operand(call.x_prev, plan.x_prev);
  work.out[Op::kXStart] = operand(call.x_start, plan.x_start);
  for (int to = Op::kKept; to < Op::kOutputs; ++to) {
    work.out[to] = operand(call.memory[to - Op::kKept], plan.memory[to - Op::kKept], 0, call.keeps);
  }
  work.draws = call.draws;
  work.first_sample = call.first_sample;
  work.first_sample_address = first_sample_address;

  unsigned given = 0;
  for (int i = 0; i < Op::kInputs; ++i) given |= (work.in[i].at != nullptr ? 1u : 0u) << i;
  work.op = {call, plan.rows, seed_address, given};
  run("posterior_step", work, on);
}

}  // namespace

void posterior_step(const PosteriorStep& plan, const PosteriorStepCall& call,
                    const uint64_t* seed_address, const uint64_t* first_sample_address,
                    const Target& on) {
  const bool plain = !call.keeps && call.output_scale == nullptr;
  plain ? run_op<false>(plan, call, seed_address, first_sample_address, on)
        : run_op<true>(plan, call, seed_address, first_sample_address, on);
}

}  // namespace fastdiff::cuda

// q_sample: x_t = signal[t]·x_start + sigma[t]·noise, with the noise given or drawn.
//
// Layouts: any strides (common/elementwise.h), each operand its own; float32, bfloat16, float16,
// arithmetic float32. Bytes moved with drawn noise: x_start and x_t, two passes; three when the
// noise is given or returned. Floor for (64, 3, 256, 256) float32, two passes: 100.7 MB, 23.4 µs at
// the 4.3 TB/s of an H200.
//
// Algorithm: elementwise.h's: load a thread's elements, draw their noise and round it to the storage
// type, so that x_t holds what a caller of the generator gets, and combine. Range: element indices
// below 2^34 where noise is drawn. A t out of range gives NaN.
#include "q_sample.h"

#include "elementwise.h"

namespace fastdiff::cuda {
namespace {

struct QSampleOp {
  enum Input { kXStart, kNoise, kInputs };
  enum Output { kXt, kDrawn, kOutputs };
  static constexpr int kBlocks = 8;
  static constexpr bool kRoundsNoise = true;

  struct Row {
    float signal, sigma;
  };

  const int64_t* t;
  const float* signal;
  const float* sigma;
  int64_t rows;
  DeviceCounters counters;
  Start values;  // those of the host

  __device__ __forceinline__ Start start() const {
    Start start = values;
    if (counters.seed != nullptr) start.seed = *counters.seed;
    if (counters.step != nullptr) start.counter_step += static_cast<uint32_t>(*counters.step);
    return start;
  }

  __device__ __forceinline__ Row row(const Start&, int64_t sample) const {
    const int64_t i = t[sample];
    if (i < 0 || i >= rows) return {NAN, NAN};
    return {signal[i], sigma[i]};
  }

  __device__ __forceinline__ bool writes(const Start&, int) const { return true; }

  template <int kCount, typename Read>
  __device__ __forceinline__ void apply(const Start& start, const Row& row, const Read& read,
                                        const float (&noise)[kCount],
                                        float (&out)[kOutputs][kCount]) const {
    using L = Lanes<float>;
    float x_start[kCount];
    read(kXStart, x_start);
    const bool noisy = start.draws || start.has(kNoise);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float sum = L::mul(x_start[i], row.signal);
      out[kXt][i] = noisy ? L::fma(noise[i], row.sigma, sum) : sum;
      out[kDrawn][i] = noise[i];
    }
  }
};

}  // namespace

void q_sample(const QSample& plan, const QSampleCall& call, const DeviceCounters& counters,
              const Target& on) {
  Work<QSampleOp> work = {};
  work.shape = plan.shape;
  work.in[QSampleOp::kXStart] = operand(call.x_start, plan.x_start);
  work.in[QSampleOp::kNoise] = operand(call.noise, plan.noise, 0, !call.draws);
  work.out[QSampleOp::kXt] = operand(call.x_t, plan.x_t);
  work.out[QSampleOp::kDrawn] = operand(call.noise, plan.noise, 0, call.draws);
  work.draws = call.draws;
  work.first_sample = call.first_sample;
  work.first_sample_address = counters.first_sample;

  const bool reads_noise = !call.draws && call.noise != nullptr;
  const unsigned reads = 1u << QSampleOp::kXStart | static_cast<unsigned>(reads_noise)
                                                        << QSampleOp::kNoise;
  work.op = {call.t,    call.signal, call.sigma,
             plan.rows, counters,    {reads, call.draws, call.seed, call.step}};
  run("q_sample", work, on);
}

}  // namespace fastdiff::cuda

// q_sample: x_t = signal[t]·x_start + sigma[t]·noise, with the noise given or drawn.
//
// Layouts: any strides (common/elementwise.h), each operand its own; float32, bfloat16, float16,
// arithmetic float32. Bytes moved with drawn noise: x_start and x_t, two passes; three when the
// noise is given or returned. With drawn noise the floor is the generator's arithmetic (normal.cpp).
//
// Algorithm: by blocks (blocks.h): draw, round to the storage type so that x_t holds what a caller
// of the generator gets, and combine. Range: element indices below 2^34.
#include "q_sample.h"

#include "blocks.h"
#include "draw.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

// x_t may be x or noise's own place.
void combine(float signal, const float* x, float sigma, const float* noise, float* x_t,
             int64_t count) {
  for_each_register(count, [&](int64_t i, const auto& get, const auto& put) {
    Vec sum = get(x + i) * splat(signal);
    if (noise != nullptr) sum = fma(get(noise + i), splat(sigma), sum);
    put(x_t + i, sum);
  });
}

}  // namespace

int64_t q_sample(const QSample& plan, const QSampleCall& call, int threads) {
  for (int64_t sample = 0; sample < plan.shape.samples; ++sample) {
    if (call.t[sample] < 0 || call.t[sample] >= plan.rows) return sample;
  }
  for_each_block(plan.shape, threads, [&](int64_t sample, int64_t begin, int64_t end) {
    alignas(64) float drawn[kBlock + kGroup], x_block[kBlock], noise_block[kBlock];
    const float signal = call.signal[call.t[sample]];
    const float sigma = call.sigma[call.t[sample]];
    const float* first = nullptr;
    if (call.draws) {
      const uint64_t number = call.first_sample + static_cast<uint64_t>(sample);
      first = draw_elements({call.seed, call.step, number}, begin, end, drawn);
      round_block(plan.x_start.dtype, drawn, end - begin + begin % 4);
    }
    for_each_run(plan.shape, begin, end, [&](const Run& run, int64_t offset) {
      const float* noise = nullptr;
      if (call.draws) {
        noise = first + offset;
        if (call.noise != nullptr) write_run(noise, call.noise, plan.noise, sample, run);
      } else if (call.noise != nullptr) {
        noise = read_run(call.noise, plan.noise, sample, run, noise_block);
      }
      const float* x = read_run(call.x_start, plan.x_start, sample, run, x_block);
      float* x_t = target_of_run(call.x_t, plan.x_t, sample, run, x_block);
      combine(signal, x, sigma, noise, x_t, run.count);
      write_run(x_t, call.x_t, plan.x_t, sample, run);
    });
  });
  return -1;
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

// posterior_step: one sampler step from one row of a step table (common/step.h) in one pass.
//
// Layouts: any strides (common/elementwise.h), each operand its own; float32, bfloat16, float16,
// arithmetic float32. Bytes moved with drawn noise: x_t, the network's output and x_prev, three
// passes; one more each for a learned variance, guidance, a given noise, every slot of memory that
// the row reads or writes, and x_start returned. Where noise is drawn the floor is the generator's arithmetic (normal.cpp).
//
// Algorithm: by blocks (blocks.h): draw, then each term of the step from L1. The row, the counter's
// step and the guidance scale are read here, so that a step kept in a tensor is never looked at in
// Python. Range: element indices below 2^34.
#include "posterior_step.h"

#include "../common/step.h"

#include "blocks.h"
#include "draw.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

struct Terms {
  const float* x_t;
  const float* output;
  const float* unconditional;   // null: no guidance
  const float* variance;        // null: sigma alone
  const float* noise;           // null: the row adds none
  const float* memory[kSlots];  // null: the row does not read it
  float* x_prev;
  float* x_start;  // null: not wanted
  float* kept;     // null: the row writes no memory
};

// kMore: with memory, in place (a register's elements are read before they are written), and a scale
// of the output.
template <bool kMore>
FASTDIFF_VEC void apply(const StepRow row, float guidance, float scale, const Terms at, int64_t count) {
  for_each_register(count, [&](int64_t i, const auto& get, const auto& put) {
    const Vec x_t = get(at.x_t + i);
    Vec output = get(at.output + i);
    if (at.unconditional) output = guide(output, get(at.unconditional + i), guidance);
    if constexpr (kMore) output = Lanes<Vec>::mul(Lanes<Vec>::splat(scale), output);
    const Vec x0 = predicted_x_start(row, x_t, output);
    Vec x_prev = mean_of_step(row, x0, x_t, output);
    if constexpr (kMore) {
      for (int slot = 0; slot < kSlots; ++slot) {
        const float* held = at.memory[slot];
        if (held) x_prev = add_term(x_prev, memory_factor(row, slot), get(held + i));
      }
      if (at.kept) put(at.kept + i, kept_of_step(row, x0, x_t));
    }
    if (at.noise) {
      const Vec z = get(at.noise + i);
      x_prev = at.variance ? fma(learned_std(row, get(at.variance + i)), z, x_prev)
                           : add_term(x_prev, row.sigma, z);
    }
    put(at.x_prev + i, x_prev);
    if (at.x_start) put(at.x_start + i, x0);
  });
}

int64_t value_at(const void* address, bool wide) {
  return wide ? *static_cast<const int64_t*>(address) : *static_cast<const int32_t*>(address);
}

template <typename T>
const T* advanced(const void* base, int64_t elements) {
  return static_cast<const T*>(base) + elements;
}

const void* advanced(const void* base, DType dtype, int64_t elements) {
  return dtype == DType::kFloat32 ? static_cast<const void*>(advanced<float>(base, elements))
                                  : advanced<uint16_t>(base, elements);
}

}  // namespace

bool posterior_step(const PosteriorStep& plan, const PosteriorStepCall& call, int threads) {
  const int64_t index =
      call.step_address ? value_at(call.step_address, call.step_is_wide) : call.step;
  if (index < 0 || index >= plan.rows) return false;
  const StepRow row = step_row(call.table, index);
  const float guidance = call.guidance_address ? *call.guidance_address : call.guidance;
  const bool noisy = row.sigma != 0.0f;
  const bool draws = noisy && call.draws;
  const bool given = noisy && !call.draws && call.noise != nullptr;
  const bool own = call.unconditional != nullptr;
  const Layout& unconditional_layout = own ? plan.unconditional : plan.output;
  const void* unconditional = call.unconditional;
  if (plan.guidance_offset >= 0) {
    unconditional = advanced(call.output, plan.output.dtype, plan.guidance_offset);
  }
  const void* variance = plan.variance_offset >= 0
                             ? advanced(call.output, plan.output.dtype, plan.variance_offset)
                             : nullptr;
  const void* read_memory[kSlots] = {};
  int written = -1;
  for (int slot = 0; slot < kSlots; ++slot) {
    if (memory_factor(row, slot) != 0.0f) read_memory[slot] = call.memory[slot];
    if (call.keeps && call.memory[slot] != nullptr && row.slot == slot) written = slot;
  }
  const bool reads_memory = read_memory[0] || read_memory[1] || read_memory[2];
  const bool more = reads_memory || written >= 0 || call.output_scale != nullptr;

  for_each_block(plan.shape, threads, [&](int64_t sample, int64_t begin, int64_t end) {
    alignas(64) float drawn[kBlock + kGroup];
    alignas(64) float blocks[8 + kSlots][kBlock];
    const float scale = call.output_scale != nullptr ? call.output_scale[sample] : 1.0f;
    const float* first = nullptr;
    if (draws) {
      const uint64_t number = call.first_sample + static_cast<uint64_t>(sample);
      const uint32_t counter = call.first_step + static_cast<uint32_t>(index);
      first = draw_elements({call.seed, counter, number}, begin, end, drawn);
    }
    for_each_run(plan.shape, begin, end, [&](const Run& run, int64_t offset) {
      const auto read = [&](const void* base, const Layout& layout, int block) {
        return base == nullptr ? nullptr : read_run(base, layout, sample, run, blocks[block]);
      };
      Terms at;
      at.x_t = read(call.x_t, plan.x_t, 0);
      at.output = read(call.output, plan.output, 1);
      at.unconditional = read(unconditional, unconditional_layout, 2);
      at.variance = noisy ? read(variance, plan.output, 3) : nullptr;
      at.noise = draws ? first + offset : read(given ? call.noise : nullptr, plan.noise, 4);
      at.x_prev = target_of_run(call.x_prev, plan.x_prev, sample, run, blocks[5 + kSlots]);
      at.x_start = call.x_start == nullptr
                       ? nullptr
                       : target_of_run(call.x_start, plan.x_start, sample, run, blocks[6 + kSlots]);
      if (more) {
        for (int slot = 0; slot < kSlots; ++slot) {
          at.memory[slot] = read(read_memory[slot], plan.memory[slot], 5 + slot);
        }
        at.kept = written < 0 ? nullptr
                              : target_of_run(call.memory[written], plan.memory[written], sample, run,
                                              blocks[7 + kSlots]);
        apply<true>(row, guidance, scale, at, run.count);
        if (at.kept) write_run(at.kept, call.memory[written], plan.memory[written], sample, run);
      } else {
        apply<false>(row, guidance, scale, at, run.count);
      }
      write_run(at.x_prev, call.x_prev, plan.x_prev, sample, run);
      if (at.x_start) write_run(at.x_start, call.x_start, plan.x_start, sample, run);
    });
  });
  return true;
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

// group_norm_silu, backward: the gradients of x, weight, bias, scale, shift and add.
//
//   dv = dy · (σ(v) + v·σ(v)·(1 − σ(v)))       or dy without the activation; v, x̂ recomputed from x
//   dx = rstd · (gain·dv − c1 − x̂·c2)          c1, c2: means over the group of gain·dv and gain·dv·x̂
//
// Layouts: planar and channels_last; float32, bfloat16, float16. Bytes moved: dy and x once from
// memory and once from cache, dx once. Floor: 3 passes.
//
// First pass: Σ dv, Σ dv·x̂ and Σ x̂ per channel and piece of its positions; second pass: dx. Pieces
// depend on the shape alone and are added in order: no result depends on the number of threads.
// With float32 the first pass leaves dv where dx is to come, and the second spares the sigmoid.
#include "group_norm_silu.h"

#include "group_norm_backward_channels_last.h"
#include "group_norm_backward_planar.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

template <typename T, bool kResidual, bool kSilu>
int64_t run(const GroupNormShape& shape, const GroupNormBackward& call, float* workspace,
            int threads) {
  const int team = team_of(shape, threads);
  Arena arena{workspace};
  const Coefficients coefficients = read_coefficients(shape, call, arena);
  float* totals = arena.take(3 * shape.samples * padded(shape.channels));
  const Backward<T, kResidual, kSilu> base{{shape, call, coefficients, totals, nullptr}};
  if (shape.channels_last) {
    ChannelsLastBackward<T, kResidual, kSilu> slab{base, nullptr};
    slab.sums = arena.take(shape.samples * slab.blocks * 3 * slab.row);
    slab.scratch = arena.take(team * 9 * slab.row);
    if (workspace != nullptr) {
      run_channels_last_backward(slab, team);
      slab.write_parameters(slab.scratch);
    }
    return arena.used;
  }
  PlanarBackward<T, kResidual, kSilu> planar{base};
  planar.sums = arena.take(3 * shape.samples * shape.channels * planar.pieces);
  float* scratch = arena.take(team * planar.scratch_elements());
  if (workspace != nullptr) {
    run_planar_backward(planar, scratch, team);
    planar.write_parameters(scratch);
  }
  return arena.used;
}

}  // namespace

int64_t group_norm_silu_backward(const GroupNormShape& shape, const GroupNormBackward& call,
                                 float* workspace, int threads) {
  return with_constants(shape, [&](auto element, auto residual, auto silu) {
    using T = decltype(element);
    return run<T, residual.value, silu.value>(shape, call, workspace, threads);
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

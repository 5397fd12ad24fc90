// csrc/cuda/normal.cu and csrc/common/philox.h as C functions, for ctypes.
#include "../../csrc/cuda/normal.cu"

extern "C" {

void limit_grid(unsigned limit) { emulated_grid_limit = limit; }

int emulated_normal(void* out, int dtype, int64_t samples, int64_t channels, int64_t spatial,
                    int64_t sample_stride, int64_t channel_stride, int64_t spatial_stride,
                    uint64_t seed, uint32_t step, uint64_t first_sample,
                    const uint64_t* seed_address, const int64_t* step_address) {
  const fastdiff::NormalFill fill = {out,          static_cast<fastdiff::DType>(dtype),
                                     samples,      channels,
                                     spatial,      sample_stride,
                                     channel_stride, spatial_stride,
                                     seed,         step,
                                     first_sample};
  return fastdiff::cuda::normal(fill, {seed_address, step_address}, nullptr);
}

int emulated_philox(uint32_t* out, int64_t quads, uint64_t seed, uint32_t step, uint64_t sample,
                    uint32_t first_quad) {
  return fastdiff::cuda::philox(out, quads, seed, step, sample, first_quad, nullptr);
}

void box_muller(const uint32_t* words, float* normals, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    fastdiff::box_muller(words[2 * i], words[2 * i + 1], normals + 2 * i, normals + 2 * i + 1);
  }
}
}

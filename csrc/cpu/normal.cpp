// normal: counter-based Gaussian noise (common/philox.h), written in float32, bfloat16 or float16.
//
// Layouts: samples of (channels, spatial) with any strides; contiguous and channels_last are the
// ones in use. Bytes moved: the output, once. The floor is the generator's arithmetic, not memory:
// about 250 vector instructions for four registers of elements.
//
// Algorithm: a thread takes a tile of a sample (blocks.h), draws it in blocks that stay in L1
// (draw.h), and writes each block through the strides.
// Range: element indices below 2^34 (a 32-bit counter word of four elements each).
#include "normal.h"

#include "blocks.h"
#include "draw.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

void normal(const NormalFill& fill, int threads) {
  const Shape shape = {fill.samples, fill.channels, fill.spatial};
  const Layout layout = {fill.dtype, fill.sample_stride, fill.channel_stride, fill.spatial_stride};
  for_each_block(shape, threads, [&](int64_t sample, int64_t begin, int64_t end) {
    alignas(64) float noise[kBlock + kGroup];
    const Stream stream = {fill.seed, fill.step, fill.first_sample + static_cast<uint64_t>(sample)};
    const float* first = draw_elements(stream, begin, end, noise);
    for_each_run(shape, begin, end, [&](const Run& run, int64_t offset) {
      write_run(first + offset, fill.out, layout, sample, run);
    });
  });
}

void philox(uint32_t* out, int64_t quads, uint64_t seed, uint32_t step, uint64_t sample,
            uint32_t first_quad) {
  for (int64_t i = 0; i < quads; ++i) {
    const Words4 words = philox_words(seed, step, sample, first_quad + static_cast<uint32_t>(i));
    for (int lane = 0; lane < 4; ++lane) out[4 * i + lane] = words.w[lane];
  }
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

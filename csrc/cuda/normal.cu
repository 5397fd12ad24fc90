// normal: counter-based Gaussian noise, written in float32, bfloat16 or float16: the fused kernels'
// (fast_normal.h), or to the bit the CPU's (common/philox.h).
//
// Layouts: samples of (channels, spatial) with any strides; contiguous samples whose rows are
// 16-byte aligned are stored four elements at a time. Bytes moved: the output, once; floor for
// (64, 3, 256, 256) float32: 50.3 MB, 11.7 µs at the 4.3 TB/s of an H200.
//
// Algorithm: one thread draws one counter's four elements; x strides over the counters of a
// sample and y over samples, so that a contiguous fill needs no division.
// Range: element indices below 2^34. Channels_last writes are strided by the channel count and
// meet in L2, which suits the few channels of images.
#include "normal.h"

#include "fast_normal.h"
#include "launch.h"
#include "vec.h"

namespace fastdiff::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocksX = 1 << 16;
constexpr int64_t kMaxBlocksY = 1 << 15;

template <typename T, bool kPacked, bool kExact>
__global__ void __launch_bounds__(kThreads)
    normal_kernel(const NormalFill fill, const DeviceCounters counters) {
  const uint64_t seed = counters.seed ? *counters.seed : fill.seed;
  const uint32_t step = counters.step ? static_cast<uint32_t>(*counters.step) : fill.step;
  const uint64_t first_sample = counters.first_sample ? *counters.first_sample : fill.first_sample;
  const int64_t elements = fill.channels * fill.spatial;
  const int64_t quads = (elements + 3) / 4;

  for (int64_t sample = blockIdx.y; sample < fill.samples; sample += gridDim.y) {
    T* out = static_cast<T*>(fill.out) + sample * fill.sample_stride;
    const uint64_t index = first_sample + static_cast<uint64_t>(sample);
    for (int64_t quad = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; quad < quads;
         quad += static_cast<int64_t>(gridDim.x) * kThreads) {
      const Words4 words = philox_words(seed, step, index, static_cast<uint32_t>(quad));
      const Normals4 normals = kExact ? normals_of(words) : fast_normals_of(words);
      if constexpr (kPacked) {
        Pack<T, 4> packed;
        for (int lane = 0; lane < 4; ++lane) packed.value[lane] = from_float<T>(normals.n[lane]);
        reinterpret_cast<Pack<T, 4>*>(out)[quad] = packed;
      } else {
        for (int lane = 0; lane < 4; ++lane) {
          const int64_t element = 4 * quad + lane;
          if (element >= elements) break;
          const int64_t channel = fill.channels == 1 ? 0 : element / fill.spatial;
          const int64_t position = element - channel * fill.spatial;
          out[channel * fill.channel_stride + position * fill.spatial_stride] =
              from_float<T>(normals.n[lane]);
        }
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    philox_kernel(uint32_t* out, int64_t quads, uint64_t seed, uint32_t step, uint64_t sample,
                  uint32_t first_quad) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < quads;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const Words4 words = philox_words(seed, step, sample, first_quad + static_cast<uint32_t>(i));
    for (int lane = 0; lane < 4; ++lane) out[4 * i + lane] = words.w[lane];
  }
}

Launch configuration(const char* name, int64_t quads, int64_t samples, void* stream) {
  const int64_t wanted = (quads + kThreads - 1) / kThreads;
  const dim3 grid(static_cast<unsigned>(wanted < kMaxBlocksX ? wanted : kMaxBlocksX),
                  static_cast<unsigned>(samples < kMaxBlocksY ? samples : kMaxBlocksY));
  return {name, grid, kThreads, stream};
}

template <typename T>
bool packable(const NormalFill& fill) {
  const bool one_run =
      fill.spatial_stride == 1 && (fill.channels == 1 || fill.channel_stride == fill.spatial);
  return one_run && fill.channels * fill.spatial % 4 == 0 && fill.sample_stride % 4 == 0 &&
         is_aligned(fill.out, sizeof(Pack<T, 4>));
}

template <typename T, bool kExact>
void fill_with(const Launch& how, const NormalFill& fill, const DeviceCounters& counters) {
  if (packable<T>(fill)) {
    launch<normal_kernel<T, true, kExact>>(how, fill, counters);
  } else {
    launch<normal_kernel<T, false, kExact>>(how, fill, counters);
  }
}

}  // namespace

void normal(const NormalFill& fill, const DeviceCounters& counters, bool exact, void* stream) {
  const int64_t quads = (fill.channels * fill.spatial + 3) / 4;
  if (quads == 0 || fill.samples == 0) return;
  const Launch how = configuration("normal", quads, fill.samples, stream);
  with_type(fill.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (exact) {
      fill_with<T, true>(how, fill, counters);
    } else {
      fill_with<T, false>(how, fill, counters);
    }
  });
}

void philox(uint32_t* out, int64_t quads, uint64_t seed, uint32_t step, uint64_t sample,
            uint32_t first_quad, void* stream) {
  if (quads == 0) return;
  launch<philox_kernel>(configuration("philox", quads, 1, stream), out, quads, seed, step, sample,
                        first_quad);
}

}  // namespace fastdiff::cuda

// A convolution with the norm before it and the additions after it, in one pass over memory.
//
// The output rows are cut into bands whose input fits into L2 (convolution_geometry.h); images smaller
// than a band are taken several at a time. A thread fills its scratch memory with a band's normalised
// and activated input and multiplies it, one block of output channels after the other, so that the
// weights stream through once for all of a band's outputs. Where there are fewer bands than threads,
// the output channels are shared out too, and the input is filled more than once.
//
// An output is the same sum in the same order however the work is cut, and moments are merged from
// strips of rows that follow from the shape alone: the number of threads changes no bit.
#include "convolution.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__AVX2__)
#include <cpuid.h>
#endif

#include "convolution_products.h"
#include "convolution_results.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t kBandBytes = 384 << 10;  // of scratch that leaves the L2 room for weights
constexpr int64_t kFewOutputs = 192;       // of a thread: below, threads share output channels
constexpr int64_t kStripOutputs = 64;      // of a strip that has moments of its own

#if defined(FASTDIFF_AMX)
// Linux saves the tiles of a process that has asked for it.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr int kRequest = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool there = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16 and AMX-TILE
  return there && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Plan {
  int64_t strip_rows, strips;  // of a sample
  int64_t band_rows, bands;    // of a sample
  int64_t units;               // bands of all samples
  int64_t group;               // units that a task takes one after the other, block by block
  int64_t groups;
  int64_t blocks;  // of output channels
  int64_t shares;  // tasks that share a group's output channels
  int64_t scratch_bytes;  // of a unit
  int64_t out_stride;     // output channels, filled up to whole blocks
};

template <typename Multiplier>
Plan plan_of(const ConvolutionShape& s, int threads) {
  using As = typename Multiplier::As;
  const int64_t lines = ceil_div(s.channels + s.second_channels, As::kLine);
  const auto bytes = [&](int64_t rows) {
    return Geometry(s, rows).places * lines * kLineBytes * As::kImages;
  };
  Plan p;
  p.strip_rows = smaller(s.out_height, ceil_div(kStripOutputs, s.out_width));
  p.strips = ceil_div(s.out_height, p.strip_rows);
  p.blocks = ceil_div(s.out_channels, Multiplier::kOutputs);
  p.out_stride = p.blocks * Multiplier::kOutputs;
  const int64_t outputs = s.samples * s.out_height * s.out_width;
  const bool few = outputs < threads * kFewOutputs;
  // Strips of a band: as many as fit, and a whole number of bands for each thread.
  const int64_t fit = larger(1, (kBandBytes - bytes(0)) / larger(1, bytes(p.strip_rows) - bytes(0)));
  int64_t bands = ceil_div(p.strips, fit);
  if (!few) {
    const int64_t wanted = ceil_div(s.samples * bands, threads) * threads;
    bands = smaller(p.strips, ceil_div(wanted, s.samples));
  }
  p.band_rows = ceil_div(p.strips, bands) * p.strip_rows;
  p.bands = ceil_div(s.out_height, p.band_rows);
  p.units = s.samples * p.bands;
  p.scratch_bytes = bytes(p.band_rows);
  const int64_t most = few ? p.units : ceil_div(p.units, threads);
  p.group = larger(1, smaller(most, kBandBytes / p.scratch_bytes));
  p.groups = ceil_div(p.units, p.group);
  p.shares = smaller(p.blocks, ceil_div(threads, p.groups));
  return p;
}

// The strips' moments of sample `n` to (2, out_channels).
void merge_strips(const ConvolutionShape& s, const Plan& p, const float* strips, float* to) {
  for (int64_t k = 0; k < s.out_channels; k += kWidth) {
    const int lanes = static_cast<int>(smaller(kWidth, s.out_channels - k));
    Vec mean{}, squares{};
    float count = 0.0f;
    for (int64_t strip = 0; strip < p.strips; ++strip) {
      const float* at = strips + strip * 2 * p.out_stride + k;
      const int64_t rows = smaller(p.strip_rows, s.out_height - strip * p.strip_rows);
      const float more = static_cast<float>(rows * s.out_width);
      const float share = more / (count + more);  // Chan, Golub & LeVeque 1983
      const Vec delta = load(at) - mean;
      mean = fma(delta, splat(share), mean);
      squares = squares + fma(delta * delta, splat(count * share), load(at + p.out_stride));
      count += more;
    }
    store_n(to + k, mean, lanes);
    store_n(to + s.out_channels + k, squares / splat(count), lanes);
  }
}

template <typename T, typename Multiplier>
int64_t run(const ConvolutionShape& s, const ConvolutionCall& call, float* workspace, int threads) {
  using As = typename Multiplier::As;
  constexpr int kVectors = Multiplier::kOutputs / kWidth;
  constexpr int64_t kLineFloats = kLineBytes / 4;
  const Plan p = plan_of<Multiplier>(s, threads);
  const bool wants_moments = call.moments != nullptr;
  const int64_t strips_floats = p.strips * 2 * p.out_stride;
  const int64_t scratch_floats = p.group * p.scratch_bytes / 4;
  const int64_t tasks = p.groups * p.shares;
  const int team = static_cast<int>(smaller(threads, tasks));
  const int64_t needed =
      kLineFloats + team * scratch_floats + (wants_moments ? s.samples * strips_floats : 0);
  if (workspace == nullptr) return needed;
  float* const aligned = reinterpret_cast<float*>(
      ceil_div(reinterpret_cast<intptr_t>(workspace), kLineBytes) * kLineBytes);
  float* const strips = wants_moments ? aligned + team * scratch_floats : nullptr;

  const int64_t channels = s.channels + s.second_channels;
  const int64_t taps = s.kernel_height * s.kernel_width;
  const Geometry geometry(s, p.band_rows);
  Left left;
  left.line = geometry.places * kLineBytes;
  left.lines = ceil_div(channels, As::kLine);
  left.image = left.line * left.lines;
  left.geometry = &geometry;
  const int64_t panel_bytes = left.lines * taps * Multiplier::kTapBytes;
  const T* const residuals = static_cast<const T*>(call.residual);
  T* const y = static_cast<T*>(call.y);
  const int64_t sample_elements = s.out_height * s.out_width * s.out_channels;

#pragma omp parallel num_threads(team) if (team > 1)
  {
    char* const scratch = reinterpret_cast<char*>(aligned + thread_index() * scratch_floats);
    alignas(64) float products[Multiplier::kPositions * Multiplier::kOutputs];
    Multiplier multiplier;
    int64_t filled = -1, begun = -1;
    for (int64_t task = thread_index(); task < tasks; task += thread_count()) {
      const int64_t group = task / p.shares, share = task % p.shares;
      const int64_t first = group * p.group, last = smaller(first + p.group, p.units);
      const auto rows_of = [&](int64_t unit, int64_t& top) {
        top = unit % p.bands * p.band_rows;
        return smaller(p.band_rows, s.out_height - top);
      };
      for (int64_t unit = first; unit < last && group != filled; ++unit) {
        int64_t top;
        const int64_t rows = rows_of(unit, top);
        fill<T, As>(scratch + (unit - first) * p.scratch_bytes, left.image, geometry, s, call,
                    unit / p.bands, top, rows);
      }
      filled = group;
      for (int64_t block = p.blocks * share / p.shares; block < p.blocks * (share + 1) / p.shares;
           ++block) {
        const int64_t k = block * Multiplier::kOutputs;
        const char* panel = static_cast<const char*>(call.panels) + block * panel_bytes;
        for (int64_t unit = first; unit < last; ++unit) {
          const int64_t n = unit / p.bands;
          int64_t top;
          const int64_t rows = rows_of(unit, top), outputs = geometry.outputs(rows);
          if (begun != outputs) multiplier.begin(outputs);
          begun = outputs;
          const int there = static_cast<int>(smaller(Multiplier::kOutputs, s.out_channels - k));
          const Results<T, kVectors> results = {
              geometry,
              s.out_channels,
              there,
              call.bias == nullptr ? nullptr : call.bias + k,
              call.add == nullptr ? nullptr : call.add + n * s.add_stride + k,
              residuals == nullptr ? nullptr : residuals + n * sample_elements + k,
              y + n * sample_elements + k,
              strips == nullptr ? nullptr : strips + n * strips_floats + k,
              p.out_stride,
              p.strip_rows};
          RunningMoments<kVectors> moments;
          const int64_t step = multiplier.positions(outputs);
          for (int64_t place = 0; place < outputs; place += step) {
            const int64_t count = smaller(step, outputs - place);
            left.places = scratch + (unit - first) * p.scratch_bytes + place * kLineBytes;
            multiplier.multiply(left, panel, count, products);
            const int64_t row = top + place / geometry.pitch, column = place % geometry.pitch;
            if (there == Multiplier::kOutputs) {
              results.template take<true>(products, row, column, count, top + rows, moments);
            } else {
              results.template take<false>(products, row, column, count, top + rows, moments);
            }
          }
        }
      }
    }
    if (begun >= 0) multiplier.end();
  }
  for (int64_t n = 0; wants_moments && n < s.samples; ++n) {
    merge_strips(s, p, strips + n * strips_floats, call.moments + n * 2 * s.out_channels);
  }
  return needed;
}

template <typename Multiplier>
int64_t run(const ConvolutionShape& s, const ConvolutionCall& call, float* workspace, int threads) {
  switch (s.dtype) {
    case DType::kFloat32:
      return run<float, Multiplier>(s, call, workspace, threads);
    case DType::kBFloat16:
      return run<BFloat16, Multiplier>(s, call, workspace, threads);
    case DType::kFloat16:
      return run<Float16, Multiplier>(s, call, workspace, threads);
  }
  return 0;
}

template <typename Multiplier>
int64_t panel_bytes(int64_t out_channels, int64_t channels, int64_t taps) {
  return ceil_div(out_channels, Multiplier::kOutputs) * ceil_div(channels, Multiplier::As::kLine) *
         taps * Multiplier::kTapBytes;
}

template <typename Multiplier>
void pack(const Weights& weights, char* to, int threads) {
  const int64_t lines = ceil_div(weights.channels, Multiplier::As::kLine), taps = weights.taps;
  const int64_t pieces = ceil_div(weights.out_channels, Multiplier::kOutputs) * lines;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      Multiplier::pack(to + (piece * taps + tap) * Multiplier::kTapBytes, weights,
                     piece / lines * Multiplier::kOutputs, piece % lines * Multiplier::As::kLine, tap);
    }
  }
}

// each.template operator()<P>() for the struct P that makes such products.
template <typename Each>
auto with_products(Products products, const Each& each) {
#if defined(FASTDIFF_AMX)
  if (products == Products::kBFloat16) return each(TileProducts<false>{});
  if (products == Products::kSplit) return each(TileProducts<true>{});
#else
  (void)products;
#endif
  return each(Float32Products{});
}

}  // namespace

bool convolution_serves(Products products) {
  if (products == Products::kFloat32) return true;
#if defined(FASTDIFF_AMX)
  static const bool tiles = may_use_tiles();
  return tiles;
#else
  return false;
#endif
}

int64_t convolution_panels(Products products, int64_t out_channels, int64_t channels,
                           int64_t taps) {
  return with_products(products, [&](auto made) {
    return panel_bytes<decltype(made)>(out_channels, channels, taps);
  });
}

void pack_convolution(Products products, const ConvolutionWeight& w, void* panels, int threads) {
  const Weights weights = {w.values, w.out_channels,   w.channels,
                           w.taps,   w.out_stride, w.channel_stride, w.tap_stride};
  with_products(products, [&](auto made) {
    pack<decltype(made)>(weights, static_cast<char*>(panels), threads);
  });
}

int64_t convolution(const ConvolutionShape& shape, const ConvolutionCall& call, float* workspace,
                    int threads) {
  return with_products(shape.products, [&](auto made) {
    return run<decltype(made)>(shape, call, workspace, threads);
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

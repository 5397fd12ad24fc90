// A convolution with the norm before it and the additions after it, in one pass over memory.
//
// The output rows are cut into bands whose input fits into L2 (in the form in which it is multiplied:
// convolution_taps.h, convolution_winograd.h); images smaller than a band are taken several at a time.
// A thread fills its scratch memory with a band's normalised and activated input and multiplies it,
// one block of output channels after the other, so that the weights stream through once for all of a
// band's outputs. Where there are fewer bands than threads, the output channels are shared out too,
// and the input is filled more than once.
//
// An output is the same sum in the same order however the work is cut, and moments are merged from
// strips of rows that follow from the shape alone: the number of threads changes no bit.
#include "convolution.h"

#include "convolution_taps.h"
#include "convolution_winograd.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t kStripOutputs = 64;  // of a strip that has moments of its own

struct Plan {
  int64_t strip_rows, strips;  // of a sample
  int64_t band_rows, bands;    // of a sample
  int64_t units;               // bands of all samples
  int64_t group;               // units that a task takes one after the other, block by block
  int64_t groups;
  int64_t blocks;      // of output channels, one part's after the other's
  int64_t shares;      // tasks that share a group's output channels
  int64_t out_stride;  // output channels of these
};

template <typename Bands>
Plan plan_of(const ConvolutionShape& s, int threads) {
  const auto bytes = [&](int64_t rows) { return Bands::band_bytes(s, rows); };
  const Parity part(s, 0);  // the largest
  Plan p;
  p.strip_rows = ceil_div(smaller(part.rows, ceil_div(kStripOutputs, part.columns)), Bands::kRows) *
                 Bands::kRows;
  p.strips = ceil_div(part.rows, p.strip_rows);
  p.blocks = parts_of(s) * ceil_div(s.out_channels, Bands::kOutputs);
  p.out_stride = p.blocks * Bands::kOutputs;
  const int64_t outputs = s.samples * part.rows * part.columns;
  // Few outputs are cut into fewer pieces than there are threads: these share output channels, and
  // each fills the input for itself.
  const bool few = outputs < threads * Bands::kFewOutputs;
  const int64_t pieces = few ? ceil_div(threads, p.blocks) : threads;
  // Strips of a band: as many as fit, and a whole number of bands for each piece.
  const int64_t fit =
      larger(1, (Bands::kCacheBytes - bytes(0)) / larger(1, bytes(p.strip_rows) - bytes(0)));
  const int64_t wanted = ceil_div(s.samples * ceil_div(p.strips, fit), pieces) * pieces;
  const int64_t bands = smaller(p.strips, ceil_div(wanted, s.samples));
  p.band_rows = ceil_div(p.strips, bands) * p.strip_rows;
  p.bands = ceil_div(part.rows, p.band_rows);
  p.units = s.samples * p.bands;
  p.group = larger(1, smaller(ceil_div(p.units, pieces), Bands::kCacheBytes / bytes(p.band_rows)));
  p.groups = ceil_div(p.units, p.group);
  p.shares = smaller(p.blocks, ceil_div(threads, p.groups));
  return p;
}

// The strips' moments of sample `n` to (2, out_channels).
void merge_strips(const ConvolutionShape& s, const Plan& p, const float* strips, float* to) {
  const int64_t part_stride = p.out_stride / parts_of(s);
  for (int64_t k = 0; k < s.out_channels; k += kWidth) {
    const int lanes = static_cast<int>(smaller(kWidth, s.out_channels - k));
    Vec mean{}, squares{};
    float count = 0.0f;
    for (int64_t i = 0; i < parts_of(s) * p.strips; ++i) {
      const Parity part(s, i / p.strips);
      const int64_t strip = i % p.strips;
      const int64_t rows = smaller(p.strip_rows, part.rows - strip * p.strip_rows);
      if (rows <= 0 || part.columns == 0) continue;
      const float* at = strips + strip * 2 * p.out_stride + i / p.strips * part_stride + k;
      const float more = static_cast<float>(rows * part.columns);
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

template <typename T, typename Bands>
int64_t run(const ConvolutionShape& s, const ConvolutionCall& call, float* workspace, int threads) {
  constexpr int kVectors = Bands::kOutputs / kWidth;
  constexpr int64_t kLineFloats = kLineBytes / 4;
  const Plan p = plan_of<Bands>(s, threads);
  const Parity all(s, 0);
  const bool wants_moments = call.moments != nullptr;
  const int64_t strips_floats = p.strips * 2 * p.out_stride;
  const int64_t scratch_floats = Bands::scratch(s, p.band_rows, p.group);
  const int64_t part_blocks = p.blocks / parts_of(s);
  const int64_t tasks = p.groups * p.shares;
  const int team = static_cast<int>(smaller(threads, tasks));
  const int64_t needed =
      kLineFloats + team * scratch_floats + (wants_moments ? s.samples * strips_floats : 0);
  if (workspace == nullptr) return needed;
  float* const aligned = reinterpret_cast<float*>(
      ceil_div(reinterpret_cast<intptr_t>(workspace), kLineBytes) * kLineBytes);
  float* const strips = wants_moments ? aligned + team * scratch_floats : nullptr;
  const T* const residuals = static_cast<const T*>(call.residual);
  T* const y = static_cast<T*>(call.y);
  const int64_t sample_elements = s.out_height * s.out_width * s.out_channels;

#pragma omp parallel num_threads(team) if (team > 1)
  {
    Bands bands(s, call, p.band_rows, p.group, aligned + thread_index() * scratch_floats);
    int64_t filled = -1, end = 0;
    for (int64_t task = thread_index(); task < tasks; task += thread_count()) {
      const int64_t group = task / p.shares, share = task % p.shares;
      const int64_t first = group * p.group, last = smaller(first + p.group, p.units);
      const auto rows_of = [&](int64_t unit, int64_t& top) {
        top = unit % p.bands * p.band_rows;
        return smaller(p.band_rows, all.rows - top);
      };
      if (group != filled) end = 0;
      for (int64_t unit = first; unit < last && group != filled; ++unit) {
        int64_t top;
        const int64_t rows = rows_of(unit, top);
        end = bands.template fill<T>(end, unit / p.bands, top, rows);
      }
      filled = group;
      for (int64_t block = p.blocks * share / p.shares; block < p.blocks * (share + 1) / p.shares;
           ++block) {
        bands.multiply(block, end);
        const Parity part(s, block / part_blocks);
        const int64_t k = block % part_blocks * Bands::kOutputs;
        const int64_t first_output = (part.row * s.out_width + part.column) * s.out_channels + k;
        const int there = static_cast<int>(smaller(Bands::kOutputs, s.out_channels - k));
        int64_t at = 0;
        for (int64_t unit = first; unit < last; ++unit) {
          const int64_t n = unit / p.bands;
          int64_t top;
          const int64_t rows = rows_of(unit, top);
          const Results<T, kVectors> results = {
              part.rows,
              part.columns,
              part.step * s.out_width * s.out_channels,
              part.step * s.out_channels,
              there,
              call.bias == nullptr ? nullptr : call.bias + k,
              call.add == nullptr ? nullptr : call.add + n * s.add_stride + k,
              residuals == nullptr ? nullptr : residuals + n * sample_elements + first_output,
              y + n * sample_elements + first_output,
              strips == nullptr ? nullptr : strips + n * strips_floats + block * Bands::kOutputs,
              p.out_stride,
              p.strip_rows};
          if (there == Bands::kOutputs) {
            at = bands.template take<true>(at, top, rows, results);
          } else {
            at = bands.template take<false>(at, top, rows, results);
          }
        }
      }
    }
  }
  for (int64_t n = 0; wants_moments && n < s.samples; ++n) {
    merge_strips(s, p, strips + n * strips_floats, call.moments + n * 2 * s.out_channels);
  }
  return needed;
}

template <typename Bands>
int64_t run(const ConvolutionShape& s, const ConvolutionCall& call, float* workspace, int threads) {
  switch (s.dtype) {
    case DType::kFloat32:
      return run<float, Bands>(s, call, workspace, threads);
    case DType::kBFloat16:
      return run<BFloat16, Bands>(s, call, workspace, threads);
    case DType::kFloat16:
      return run<Float16, Bands>(s, call, workspace, threads);
  }
  return 0;
}

template <typename Bands>
void pack(const Weights<float>& weights, char* panels, int threads) {
  const int64_t lines = ceil_div(weights.channels, Bands::As::kLine);
  const int64_t pieces = ceil_div(weights.out_channels, Bands::kOutputs) * lines;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    Bands::pack(panels, weights, piece / lines, piece % lines);
  }
}

template <typename T>
struct Kind {
  using Bands = T;
};

// each(Kind<Bands>), for the Bands that make such products.
template <typename Each>
auto with_products(Products products, const Each& each) {
#if defined(FASTDIFF_AMX)
  if (products == Products::kBFloat16) return each(Kind<TapBands<TileProducts<false>>>{});
  if (products == Products::kSplit) return each(Kind<TapBands<TileProducts<true>>>{});
#endif
#if defined(FASTDIFF_PAIRS)
  if (products == Products::kPairs) return each(Kind<TapBands<PairProducts>>{});
#endif
  if (products == Products::kWinograd2) return each(Kind<Winograd<2>>{});
  if (products == Products::kWinograd4) return each(Kind<Winograd<4>>{});
  return each(Kind<TapBands<Float32Products>>{});
}

}  // namespace

bool convolution_serves(Products products) {
  if (products == Products::kBFloat16 || products == Products::kSplit) return may_use_tiles();
#if defined(FASTDIFF_PAIRS)
  return true;
#else
  return products != Products::kPairs;
#endif
}

bool convolution_pays(Products products) {
  if (!convolution_serves(products)) return false;
#if defined(FASTDIFF_PAIRS)
  // An instruction for 16 pairs takes as long as one for 16 products of float32 on AMD's CPUs, and four
  // times as long on Intel's Xeons (0.74 ns and 0.19 on one of 2023). Split
  // float32 would take three of them for what two of float32's do, and is not made of pairs.
  if (products == Products::kPairs) return __builtin_cpu_is("amd");
#endif
  return true;
}

int64_t convolution_panels(Products products, int64_t out_channels, int64_t channels,
                           int64_t taps) {
  return with_products(products, [&](auto made) {
    return decltype(made)::Bands::panel_bytes(out_channels, channels, taps);
  });
}

void pack_convolution(Products products, const ConvolutionWeight& w, void* panels, int threads) {
  const Weights<float> weights = {w.values, w.out_channels,   w.channels,
                           w.taps,   w.out_stride, w.channel_stride, w.tap_stride};
  with_products(products, [&](auto made) {
    pack<typename decltype(made)::Bands>(weights, static_cast<char*>(panels), threads);
  });
}

int64_t convolution(const ConvolutionShape& shape, const ConvolutionCall& call, float* workspace,
                    int threads) {
  return with_products(shape.products, [&](auto made) {
    return run<typename decltype(made)::Bands>(shape, call, workspace, threads);
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

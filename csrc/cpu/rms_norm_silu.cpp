// rms_norm_silu: RMS norm over the channels, FiLM and SiLU (common/rms_norm_silu.h has the equations).
//
// Layouts: planar (NCHW and its 1-D and 3-D kin) and channels_last; float32, bfloat16, float16.
// Bytes moved: x once from memory and once from cache, y once. Floor: 2 passes.
//
// A tile is a run of positions with all their channels, which the second reading finds in cache.
// Threads share out the tiles of all samples. Planar: vectors of positions, channel after channel;
// eight channels' squares are added before they join a sum, which leaves an eighth of the
// roundings. channels_last: vectors of channels, position after position, four sums of squares to
// each. No position's arithmetic depends on its tile, so results do not depend on the number of
// threads.
#include "rms_norm_silu.h"

#include "lanes.h"
#include "rows.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t kTileBytes = 1 << 17;   // of x: the L2 also holds what is written
constexpr int64_t kMostPositions = 2048;  // of a tile: their sums stay in the L1
constexpr int64_t kPositions = 32;        // tiles are multiples: whole vectors and cache lines
constexpr int kChannelsAtOnce = 8;

// v = x · √channels / max(‖x‖, eps) · gain + shift, as float32 rows. Without FiLM every sample
// reads the same row.
struct Film {
  float* gain;
  float* shift;
  int64_t row;  // elements from one sample's row to the next
};

FASTDIFF_VEC Film read_film(const RmsNormShape& shape, const RmsNormCall& call, Arena& arena) {
  const int64_t channels = shape.channels, row = padded(channels);
  const bool given = call.scale != nullptr;
  const int64_t rows = given ? shape.samples : 1;
  const Film film = {arena.take(rows * row), arena.take(rows * row), given ? row : 0};
  float* weight = arena.take(row);
  if (arena.base == nullptr) return film;

  read_row(shape.weight_dtype, call.weight, 0, weight, channels);
  for (int64_t sample = 0; sample < rows; ++sample) {
    float* gain = film.gain + sample * row;
    float* shift = film.shift + sample * row;
    if (given) {
      read_row(shape.film_dtype, call.scale, sample * shape.scale_stride, gain, channels);
      read_row(shape.film_dtype, call.shift, sample * shape.shift_stride, shift, channels);
    }
    for (int64_t c = 0; c < channels; c += kWidth) {
      const Vec one_plus_scale = given ? splat(1.0f) + load(gain + c) : splat(1.0f);
      store(gain + c, load(weight + c) * one_plus_scale);
      if (!given) store(shift + c, splat(0.0f));
    }
  }
  return film;
}

// √channels / max(‖x‖, eps) in place of Σx², for `count` values padded to whole vectors. A NaN
// stays one.
FASTDIFF_VEC void invert_norms(const RmsNormShape& shape, float* squares, int64_t count) {
  const Vec root = splat(__builtin_sqrtf(static_cast<float>(shape.channels)));
  const Vec eps = splat(shape.eps);
  for (int64_t i = 0; i < count; i += kWidth) {
    const Vec norm = Lanes<Vec>::square_root(load(squares + i));
    store(squares + i, root / (norm < eps ? eps : norm));
  }
}

// --- Planar -----------------------------------------------------------------------------------

// Σx² over kChannels channels of the positions at x; `stride` elements from channel to channel.
template <int kChannels, typename Load>
FASTDIFF_VEC Vec squares_of(int64_t stride, const Load& load_channel) {
  Vec sums[2] = {};
  for (int u = 0; u < kChannels; ++u) {
    const Vec v = load_channel(u * stride);
    sums[u % 2] = fma(v, v, sums[u % 2]);
  }
  return sums[0] + sums[1];
}

template <int kChannels, typename T>
FASTDIFF_VEC void add_squares(const T* x, int64_t stride, int64_t count, float* squares) {
  int64_t p = 0;
  for (; p + kWidth <= count; p += kWidth) {
    const Vec more = squares_of<kChannels>(stride, [&](int64_t at) { return load(x + at + p); });
    store(squares + p, load(squares + p) + more);
  }
  if (p < count) {
    const int n = static_cast<int>(count - p);
    const Vec more =
        squares_of<kChannels>(stride, [&](int64_t at) { return load_n(x + at + p, n); });
    store(squares + p, load(squares + p) + more);
  }
}

template <typename T, bool kSilu>
FASTDIFF_VEC void run_planar_tile(const RmsNormShape& shape, const RmsNormCall& call,
                                  const Film& film, int64_t sample, int64_t first, int64_t count) {
  const int64_t channels = shape.channels, positions = shape.positions;
  const int64_t offset = sample * channels * positions + first;
  const T* x = static_cast<const T*>(call.x) + offset;
  T* y = static_cast<T*>(call.y) + offset;
  float inverse[kMostPositions];
  memset(inverse, 0, static_cast<size_t>(ceil_div(count, kWidth) * kWidth) * sizeof(float));
  int64_t c = 0;
  for (; c + kChannelsAtOnce <= channels; c += kChannelsAtOnce) {
    add_squares<kChannelsAtOnce>(x + c * positions, positions, count, inverse);
  }
  for (; c < channels; ++c) add_squares<1>(x + c * positions, positions, count, inverse);
  invert_norms(shape, inverse, count);

  for (c = 0; c < channels; ++c, x += positions, y += positions) {
    const Vec gain = splat(film.gain[sample * film.row + c]);
    const Vec shift = splat(film.shift[sample * film.row + c]);
    int64_t p = 0;
    for (; p + kWidth <= count; p += kWidth) {
      const Vec normed = load(x + p) * load(inverse + p);
      store(y + p, activate<T, kSilu>(fma(normed, gain, shift)));
    }
    if (p < count) {
      const int n = static_cast<int>(count - p);
      const Vec normed = load_n(x + p, n) * load(inverse + p);
      store_n(y + p, activate<T, kSilu>(fma(normed, gain, shift)), n);
    }
  }
}

// --- channels_last ----------------------------------------------------------------------------

template <typename T>
FASTDIFF_VEC float squares_of(const T* x, int64_t channels) {
  Vec sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * kWidth <= channels; c += 4 * kWidth) {
    for (int u = 0; u < 4; ++u) {
      const Vec v = load(x + c + u * kWidth);
      sums[u] = fma(v, v, sums[u]);
    }
  }
  for (; c + kWidth <= channels; c += kWidth) {
    const Vec v = load(x + c);
    sums[0] = fma(v, v, sums[0]);
  }
  if (c < channels) {
    const Vec v = load_n(x + c, static_cast<int>(channels - c));
    sums[1] = fma(v, v, sums[1]);
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T, bool kSilu>
FASTDIFF_VEC void run_channels_last_tile(const RmsNormShape& shape, const RmsNormCall& call,
                                         const Film& film, int64_t sample, int64_t first,
                                         int64_t count) {
  const int64_t channels = shape.channels;
  const float* gain = film.gain + sample * film.row;
  const float* shift = film.shift + sample * film.row;
  const int64_t offset = (sample * shape.positions + first) * channels;
  const T* x = static_cast<const T*>(call.x) + offset;
  T* y = static_cast<T*>(call.y) + offset;
  for (int64_t begin = 0; begin < count; begin += kWidth) {
    // As many roots and divisions at a time as a register holds.
    const int64_t n = smaller(kWidth, count - begin);
    float inverse[kWidth] = {};
    for (int64_t p = 0; p < n; ++p) inverse[p] = squares_of(x + p * channels, channels);
    invert_norms(shape, inverse, kWidth);
    for (int64_t p = 0; p < n; ++p, x += channels, y += channels) {
      const Vec r = splat(inverse[p]);
      int64_t c = 0;
      for (; c + kWidth <= channels; c += kWidth) {
        const Vec v = fma(load(x + c) * r, load(gain + c), load(shift + c));
        store(y + c, activate<T, kSilu>(v));
      }
      if (c < channels) {
        const int rest = static_cast<int>(channels - c);
        const Vec v = fma(load_n(x + c, rest) * r, load(gain + c), load(shift + c));
        store_n(y + c, activate<T, kSilu>(v), rest);
      }
    }
  }
}

// --- All of it --------------------------------------------------------------------------------

// Positions of a tile: as many as stay in cache, and few enough to keep a team busy.
FASTDIFF_VEC int64_t tile_of(const RmsNormShape& shape, int team) {
  const int64_t fitting = kTileBytes / (bytes_of(shape.dtype) * shape.channels);
  const int64_t largest = smaller(larger(fitting, kPositions), kMostPositions);
  const int64_t wanted = team == 1 ? 1 : ceil_div(4 * static_cast<int64_t>(team), shape.samples);
  const int64_t tiles = larger(ceil_div(shape.positions, largest), wanted);
  return smaller(ceil_div(ceil_div(shape.positions, tiles), kPositions) * kPositions,
                 kMostPositions);
}

template <typename T, bool kSilu>
void run_tiles(const RmsNormShape& shape, const RmsNormCall& call, const Film& film, int threads) {
  const int team = team_of(shape.samples * shape.channels * shape.positions, threads);
  const int64_t tile = tile_of(shape, team), tiles = ceil_div(shape.positions, tile);
#pragma omp parallel for num_threads(team) if (team > 1) schedule(static)
  for (int64_t item = 0; item < shape.samples * tiles; ++item) {
    const int64_t sample = item / tiles, first = item % tiles * tile;
    const int64_t count = smaller(tile, shape.positions - first);
    if (shape.channels_last) {
      run_channels_last_tile<T, kSilu>(shape, call, film, sample, first, count);
    } else {
      run_planar_tile<T, kSilu>(shape, call, film, sample, first, count);
    }
  }
}

template <typename T>
void run_tiles(const RmsNormShape& shape, const RmsNormCall& call, const Film& film, int threads) {
  if (shape.silu) return run_tiles<T, true>(shape, call, film, threads);
  run_tiles<T, false>(shape, call, film, threads);
}

}  // namespace

int64_t rms_norm_silu(const RmsNormShape& shape, const RmsNormCall& call, float* workspace,
                      int threads) {
  Arena arena{workspace};
  const Film film = read_film(shape, call, arena);
  if (workspace == nullptr) return arena.used;
  switch (shape.dtype) {
    case DType::kFloat32:
      run_tiles<float>(shape, call, film, threads);
      break;
    case DType::kBFloat16:
      run_tiles<BFloat16>(shape, call, film, threads);
      break;
    case DType::kFloat16:
      run_tiles<Float16>(shape, call, film, threads);
      break;
  }
  return arena.used;
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

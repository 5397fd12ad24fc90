// group_norm_silu, forward: GroupNorm, FiLM and SiLU (common/group_norm_silu.h has the equations).
//
// Layouts: planar (NCHW and its 1-D and 3-D kin) and channels_last; float32, bfloat16, float16.
// Bytes moved: x once from memory and once from cache, y once. Floor: 2 passes.
//
// Statistics: lane by lane Σ(x − s) and Σ(x − s)², s a mean of the lane's first elements, over
// blocks of at most kBlockVectors vectors; blocks, lanes and chunks merge by Chan et al. 1983. The
// shift keeps what a mean far above the deviation would cancel. Blocks and chunks depend on the
// shape alone, so that results do not depend on the number of threads.
//
// Planar: a group is one run of memory. A thread takes a group, reads it twice; where groups are
// fewer than threads, their chunks are shared out. channels_last: all groups interleave; a thread
// takes a sample, or a slab of its groups whose channels fill whole cache lines; where these are
// fewer than threads, blocks of positions.
#include "group_norm_silu.h"

#include "group_norm_moments.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t kChunk = 65536;         // elements of a group that threads share out
constexpr int64_t kBlockElements = 8192;  // channels_last: a block of positions, all channels,
constexpr int64_t kBlockPositions = 512;  // but no more of them: each is one more rounding

// --- Planar -----------------------------------------------------------------------------------

template <typename T, bool kResidual, bool kSilu>
struct Planar {
  const GroupNormShape& shape;
  const GroupNormForward& call;
  const Coefficients& coefficients;
  int64_t width = shape.channels / shape.groups;
  int64_t run = width * shape.positions;  // elements of a group

  FASTDIFF_MEMBER const T* residual_at(int64_t offset) const {
    return kResidual ? static_cast<const T*>(call.add) + offset : nullptr;
  }

  // Elements [begin, end) of group `item` of all samples' groups.
  FASTDIFF_MEMBER Moments scan(int64_t item, int64_t begin, int64_t end) const {
    const T* x = static_cast<const T*>(call.x) + item * run;
    const T* residual = residual_at(item * run);
    const float* embedding = coefficients.embedding_of(item / shape.groups);
    Scan scan;
    if (embedding == nullptr) {
      scan.run<T, kResidual>(x + begin, residual + (kResidual ? begin : 0), end - begin, Vec{});
      return scan.moments();
    }
    embedding += item % shape.groups * width;
    int64_t channel = begin / shape.positions;
    for (int64_t at = begin; at < end; ++channel) {
      const int64_t stop = smaller((channel + 1) * shape.positions, end);
      scan.run<T, false>(x + at, nullptr, stop - at, splat(embedding[channel]));
      at = stop;
    }
    return scan.moments();
  }

  FASTDIFF_MEMBER void apply(int64_t item, int64_t begin, int64_t end, float mean,
                             float rstd) const {
    const int64_t sample = item / shape.groups, first = item % shape.groups * width;
    const T* x = static_cast<const T*>(call.x) + item * run;
    const T* residual = residual_at(item * run);
    T* y = static_cast<T*>(call.y) + item * run;
    const float* gain = coefficients.gain_of(sample) + first;
    const float* offset = coefficients.offset_of(sample) + first;
    const float* embedding = coefficients.embedding_of(sample);
    int64_t channel = begin / shape.positions;
    for (int64_t at = begin; at < end; ++channel) {
      const int64_t stop = smaller((channel + 1) * shape.positions, end);
      const float add = embedding == nullptr ? 0.0f : embedding[first + channel];
      const Vec m = splat(mean - add), a = splat(gain[channel] * rstd), b = splat(offset[channel]);
      for (; at + kWidth <= stop; at += kWidth) {
        const Vec v = value<T, kResidual>(x, residual, at);
        store(y + at, activate<T, kSilu>(fma(v - m, a, b)));
      }
      if (at < stop) {
        const int n = static_cast<int>(stop - at);
        const Vec v = value_n<T, kResidual>(x, residual, at, n);
        store_n(y + at, activate<T, kSilu>(fma(v - m, a, b)), n);
        at = stop;
      }
    }
  }

  FASTDIFF_MEMBER void finish(int64_t item, Moments moments, float* rstd) const {
    *rstd = rstd_of(moments.m2, moments.count, shape.eps);
    if (call.mean != nullptr) {
      call.mean[item] = moments.mean;
      call.rstd[item] = *rstd;
    }
  }
};

template <typename T, bool kResidual, bool kSilu>
void run_planar(const GroupNormShape& shape, const GroupNormForward& call,
                const Coefficients& coefficients, Moments* parts, int team) {
  const Planar<T, kResidual, kSilu> planar{shape, call, coefficients};
  const int64_t items = shape.samples * shape.groups;
  const int64_t chunks = ceil_div(planar.run, kChunk);
  if (chunks == 1 || items >= 2 * team) {
#pragma omp parallel for num_threads(team) if (team > 1) schedule(static)
    for (int64_t item = 0; item < items; ++item) {
      Moments moments = {0, 0, 0};
      for (int64_t begin = 0; begin < planar.run; begin += kChunk) {
        moments = merge(moments, planar.scan(item, begin, smaller(begin + kChunk, planar.run)));
      }
      float rstd;
      planar.finish(item, moments, &rstd);
      planar.apply(item, 0, planar.run, moments.mean, rstd);
    }
    return;
  }
#pragma omp parallel num_threads(team)
  {
#pragma omp for schedule(static)
    for (int64_t part = 0; part < items * chunks; ++part) {
      const int64_t begin = part % chunks * kChunk;
      parts[part] = planar.scan(part / chunks, begin, smaller(begin + kChunk, planar.run));
    }
#pragma omp for schedule(static)
    for (int64_t part = 0; part < items * chunks; ++part) {
      const int64_t item = part / chunks, begin = part % chunks * kChunk;
      Moments moments = {0, 0, 0};
      for (int64_t c = 0; c < chunks; ++c) moments = merge(moments, parts[item * chunks + c]);
      float rstd = rstd_of(moments.m2, moments.count, shape.eps);
      if (begin == 0) planar.finish(item, moments, &rstd);
      planar.apply(item, begin, smaller(begin + kChunk, planar.run), moments.mean, rstd);
    }
  }
}

// --- channels_last ----------------------------------------------------------------------------

// What the element type does not change.
struct ChannelMoments {
  const GroupNormShape& shape;
  const GroupNormForward& call;
  const Coefficients& coefficients;
  float* parts;    // (samples, blocks, 2, row): each block's means and m2, channel by channel
  float* scratch;  // (team, 4, row): a sample's mean and m2, then the affine map's terms
  int64_t row = padded(shape.channels);
  int64_t block = smaller(ceil_div(kBlockElements, shape.channels), kBlockPositions);
  int64_t blocks = ceil_div(shape.positions, block);

  FASTDIFF_MEMBER int64_t first_of(int64_t index) const { return index * block; }
  FASTDIFF_MEMBER int64_t count_of(int64_t index) const {
    return smaller(block, shape.positions - index * block);
  }

  // The affine map of a sample, (x − m)·a + b channel by channel, into this thread's scratch.
  FASTDIFF_ONCE void prepare(int64_t sample, Range channels, bool keep) const {
    float* mean = scratch + thread_index() * 4 * row;
    float* m2 = mean + row;
    merge_blocks(sample, channels, mean, m2);
    const float* embedding = coefficients.embedding_of(sample);
    if (embedding != nullptr) {
      for (int64_t c = channels.first; c < channels.last; c += kWidth) {
        store(mean + c, load(mean + c) + load(embedding + c));
      }
    }
    float* a = m2 + row;
    float* b = a + row;
    const float* gain = coefficients.gain_of(sample);
    const float* offset = coefficients.offset_of(sample);
    const int64_t width = shape.channels / shape.groups;
    for (int64_t group = channels.first / width; group * width < channels.last; ++group) {
      const int64_t first = group * width;
      double offset_sum = 0, group_m2 = 0;
      const double from = mean[first];
      for (int64_t c = first; c < first + width; ++c) offset_sum += mean[c] - from;
      const double group_mean = from + offset_sum / static_cast<double>(width);
      for (int64_t c = first; c < first + width; ++c) {
        const double apart = mean[c] - group_mean;
        group_m2 += m2[c] + apart * apart * static_cast<double>(shape.positions);
      }
      const float m = static_cast<float>(group_mean);
      const float rstd = rstd_of(static_cast<float>(group_m2),
                                 static_cast<double>(width * shape.positions), shape.eps);
      for (int64_t c = first; c < first + width; ++c) {
        mean[c] = m;
        a[c] = gain[c] * rstd;
        b[c] = offset[c];
      }
      if (keep && call.mean != nullptr) {
        call.mean[sample * shape.groups + group] = m;
        call.rstd[sample * shape.groups + group] = rstd;
      }
    }
    if (embedding != nullptr) {
      for (int64_t c = channels.first; c < channels.last; c += kWidth) {
        store(mean + c, load(mean + c) - load(embedding + c));
      }
    }
  }

  FASTDIFF_ONCE void merge_blocks(int64_t sample, Range channels, float* mean, float* m2) const {
    const float* part = parts + sample * blocks * 2 * row;
    for (int64_t c = channels.first; c < channels.last; c += kWidth) {
      store(mean + c, load(part + c));
      store(m2 + c, load(part + row + c));
    }
    for (int64_t index = 1; index < blocks; ++index) {
      part += 2 * row;
      const float before = static_cast<float>(first_of(index));
      const float count = static_cast<float>(count_of(index));
      const Vec share = splat(count / (before + count));
      const Vec weight = splat(before * (count / (before + count)));
      for (int64_t c = channels.first; c < channels.last; c += kWidth) {
        const Vec delta = load(part + c) - load(mean + c);
        store(mean + c, fma(delta, share, load(mean + c)));
        store(m2 + c, load(m2 + c) + fma(delta * delta, weight, load(part + row + c)));
      }
    }
  }
};

template <typename T, bool kResidual, bool kSilu>
struct ChannelsLast : ChannelMoments {
  // kVectors vectors of channels over all positions of a block: their sums stay in registers.
  template <int kVectors>
  FASTDIFF_MEMBER void scan_channels(const T* x, const T* residual, int64_t count, float* means,
                                     float* m2s) const {
    Vec shift[kVectors] = {}, s[kVectors] = {}, q[kVectors] = {};
    const int64_t first = shift_values(count);
    for (int64_t position = 0; position < first; ++position) {
      const int64_t at = position * shape.channels;
      for (int u = 0; u < kVectors; ++u) {
        shift[u] += value<T, kResidual>(x, residual, at + u * kWidth);
      }
    }
    for (int u = 0; u < kVectors; ++u) shift[u] *= splat(1.0f / static_cast<float>(first));
    for (int64_t position = 0; position < count; ++position) {
      const int64_t at = position * shape.channels;
      for (int u = 0; u < kVectors; ++u) {
        const Vec d = value<T, kResidual>(x, residual, at + u * kWidth) - shift[u];
        s[u] += d;
        q[u] = fma(d, d, q[u]);
      }
    }
    const Vec inverse = splat(1.0f / static_cast<float>(count));
    for (int u = 0; u < kVectors; ++u) {
      const Vec m2 = q[u] - s[u] * (s[u] * inverse);
      store(means + u * kWidth, fma(s[u], inverse, shift[u]));
      store(m2s + u * kWidth, m2 > splat(0.0f) ? m2 : splat(0.0f));
    }
  }

  FASTDIFF_MEMBER void scan_tail(const T* x, const T* residual, int64_t count, int lanes,
                                 float* means, float* m2s) const {
    Vec shift{}, s{}, q{};
    const int64_t first = shift_values(count);
    for (int64_t position = 0; position < first; ++position) {
      shift += value_n<T, kResidual>(x, residual, position * shape.channels, lanes);
    }
    shift *= splat(1.0f / static_cast<float>(first));
    for (int64_t position = 0; position < count; ++position) {
      const Vec d = value_n<T, kResidual>(x, residual, position * shape.channels, lanes) - shift;
      s += d;
      q = fma(d, d, q);
    }
    const Vec inverse = splat(1.0f / static_cast<float>(count));
    const Vec m2 = q - s * (s * inverse);
    store(means, fma(s, inverse, shift));
    store(m2s, m2 > splat(0.0f) ? m2 : splat(0.0f));
  }

  FASTDIFF_MEMBER void scan(int64_t sample, int64_t index, Range channels) const {
    const int64_t offset = (sample * shape.positions + first_of(index)) * shape.channels;
    const T* x = static_cast<const T*>(call.x) + offset;
    const T* residual = kResidual ? static_cast<const T*>(call.add) + offset : nullptr;
    float* means = parts + (sample * blocks + index) * 2 * row;
    float* m2s = means + row;
    const int64_t count = count_of(index);
    int64_t c = channels.first;
    for (; c + 4 * kWidth <= channels.last; c += 4 * kWidth) {
      scan_channels<4>(x + c, residual + (kResidual ? c : 0), count, means + c, m2s + c);
    }
    for (; c + kWidth <= channels.last; c += kWidth) {
      scan_channels<1>(x + c, residual + (kResidual ? c : 0), count, means + c, m2s + c);
    }
    if (c < channels.last) {
      scan_tail(x + c, residual + (kResidual ? c : 0), count, static_cast<int>(channels.last - c),
                means + c, m2s + c);
    }
  }

  FASTDIFF_MEMBER void apply(int64_t sample, int64_t index, Range range) const {
    const int64_t offset = (sample * shape.positions + first_of(index)) * shape.channels;
    const T* x = static_cast<const T*>(call.x) + offset;
    const T* residual = kResidual ? static_cast<const T*>(call.add) + offset : nullptr;
    T* y = static_cast<T*>(call.y) + offset;
    const float* m = scratch + thread_index() * 4 * row;
    const float* a = m + 2 * row;
    const float* b = a + row;
    const int64_t count = count_of(index), channels = shape.channels;
    for (int64_t position = 0; position < count; ++position) {
      const int64_t at = position * channels;
      int64_t c = range.first;
      for (; c + kWidth <= range.last; c += kWidth) {
        const Vec v = value<T, kResidual>(x, residual, at + c);
        store(y + at + c, activate<T, kSilu>(fma(v - load(m + c), load(a + c), load(b + c))));
      }
      if (c < range.last) {
        const int n = static_cast<int>(range.last - c);
        const Vec v = value_n<T, kResidual>(x, residual, at + c, n);
        store_n(y + at + c, activate<T, kSilu>(fma(v - load(m + c), load(a + c), load(b + c))), n);
      }
    }
  }
};

template <typename T, bool kResidual, bool kSilu>
void run_channels_last(const GroupNormShape& shape, const GroupNormForward& call,
                       const Coefficients& coefficients, float* parts, float* scratch, int team) {
  const ChannelsLast<T, kResidual, kSilu> slab{{shape, call, coefficients, parts, scratch}};
  const int64_t samples = shape.samples, blocks = slab.blocks;
  const Range all = {0, shape.channels};
  const int64_t slabs = slabs_of(shape, team);
  if (slabs > 0) {  // what a thread reads first stays in its cache
    const int64_t width = shape.channels / slabs;
#pragma omp parallel for num_threads(team) if (team > 1) schedule(static)
    for (int64_t item = 0; item < samples * slabs; ++item) {
      const int64_t sample = item / slabs, first = item % slabs * width;
      const Range channels = {first, first + width};
      for (int64_t index = 0; index < blocks; ++index) slab.scan(sample, index, channels);
      slab.prepare(sample, channels, true);
      for (int64_t index = 0; index < blocks; ++index) slab.apply(sample, index, channels);
    }
    return;
  }
#pragma omp parallel num_threads(team)
  {
#pragma omp for schedule(static)
    for (int64_t part = 0; part < samples * blocks; ++part) {
      slab.scan(part / blocks, part % blocks, all);
    }
    int64_t prepared = -1;
#pragma omp for schedule(static)
    for (int64_t part = 0; part < samples * blocks; ++part) {
      const int64_t sample = part / blocks;
      if (sample != prepared) slab.prepare(sample, all, part % blocks == 0);
      prepared = sample;
      slab.apply(sample, part % blocks, all);
    }
  }
}

template <typename T, bool kResidual, bool kSilu>
int64_t run(const GroupNormShape& shape, const GroupNormForward& call, float* workspace,
            int threads) {
  const int team = team_of(shape, threads);
  Arena arena{workspace};
  const Coefficients coefficients = read_coefficients(shape, call, arena);
  if (shape.channels_last) {
    const ChannelsLast<T, kResidual, kSilu> slab{{shape, call, coefficients, nullptr, nullptr}};
    float* parts = arena.take(shape.samples * slab.blocks * 2 * slab.row);
    float* scratch = arena.take(team * 4 * slab.row);
    if (workspace != nullptr) {
      run_channels_last<T, kResidual, kSilu>(shape, call, coefficients, parts, scratch, team);
    }
    return arena.used;
  }
  const int64_t chunks = ceil_div(shape.channels / shape.groups * shape.positions, kChunk);
  float* parts = arena.take(3 * shape.samples * shape.groups * chunks);
  if (workspace != nullptr) {
    run_planar<T, kResidual, kSilu>(shape, call, coefficients, reinterpret_cast<Moments*>(parts),
                                    team);
  }
  return arena.used;
}

}  // namespace

int64_t group_norm_silu(const GroupNormShape& shape, const GroupNormForward& call, float* workspace,
                        int threads) {
  return with_constants(shape, [&](auto element, auto residual, auto silu) {
    using T = decltype(element);
    return run<T, residual.value, silu.value>(shape, call, workspace, threads);
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

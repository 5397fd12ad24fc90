// Elementwise kernels over samples of (channels, spatial) (common/elementwise.h): which thread
// computes which elements, in accesses as wide as the operands' layouts allow, with noise drawn in
// registers.
//
// An operation is a struct Op with
//   kInputs, kOutputs, kNoise   operands; which input is the noise, drawn or given
//   kBlocks                     of kThreads, that a multiprocessor holds: 65536 / 128 / its registers
//   Start start()               what it reads from the device once, and what it then needs
//   Row row(start, sample)      what it reads for one sample
//   apply(start, row, in, out)  the arithmetic on elements in registers
//
// Three kernels, of which run() chooses:
//   flat     contiguous samples: eight elements a thread in 128-bit accesses, two of each float32
//            operand and one of each narrower one
//   across   the same accesses where all operands stand in one order of memory that is not the
//            counters', as in channels_last: blocks draw into shared memory what their threads then
//            read in memory's order
//   strided  any strides and sizes: a counter's four elements a thread
#pragma once

#include "../common/elementwise.h"
#include "../common/philox.h"
#include "device.h"
#include "kernels.h"
#include "launch.h"
#include "vec.h"

namespace fastdiff::cuda {

constexpr int kThreads = 128;
constexpr int kEach = 8;                  // elements of a thread: two counters'
constexpr int kGroup = 8;                 // neighbouring threads whose accesses fill a 128-byte line
constexpr int kTile = kThreads * kEach;   // elements of a block
static_assert(kThreads % kGroup == 0);

struct Operand {
  void* at;  // null: not there
  Layout layout;
};

// What every operation's start() says: which inputs are read, bit i for input i, and whether and
// from which counters noise is drawn.
struct Start {
  unsigned reads;
  bool draws;
  uint64_t seed;
  uint32_t counter_step;

  __device__ __forceinline__ bool has(int input) const { return (reads >> input & 1u) != 0; }
};

template <typename Op>
struct Work {
  Op op;
  Shape shape;
  Operand in[Op::kInputs];
  Operand out[Op::kOutputs];
  DType drawn_as;  // what drawn noise is rounded to
  bool draws;
  uint64_t first_sample;
};

// The operand at some elements from its beginning; nowhere where it is not wanted.
inline Operand operand(const void* base, const Layout& layout, int64_t offset = 0,
                       bool wanted = true) {
  const int64_t bytes = layout.dtype == DType::kFloat32 ? 4 : 2;
  if (base == nullptr || !wanted) return {nullptr, layout};
  return {static_cast<unsigned char*>(const_cast<void*>(base)) + offset * bytes, layout};
}

// --- Values in registers ---------------------------------------------------------------------------

// Elements' bits as they stand in memory: float32 fills all of it, narrower ones the front.
template <int kCount>
struct alignas(kAccessBytes) Raw {
  uint32_t word[kCount];
};

template <typename T, int kCount>
__device__ __forceinline__ void unpack_as(const Raw<kCount>& raw, float (&values)[kCount]) {
  T stored[kCount];
  memcpy(stored, &raw, sizeof stored);
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = to_float(stored[i]);
}

template <int kCount>
__device__ __forceinline__ void unpack(DType dtype, const Raw<kCount>& raw,
                                       float (&values)[kCount]) {
  if (dtype == DType::kFloat32) {
    unpack_as<float>(raw, values);
  } else if (dtype == DType::kBFloat16) {
    unpack_as<__nv_bfloat16>(raw, values);
  } else {
    unpack_as<__half>(raw, values);
  }
}

template <typename T, int kCount>
__device__ __forceinline__ Raw<kCount> pack_as(const float (&values)[kCount]) {
  T stored[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) stored[i] = from_float<T>(values[i]);
  Raw<kCount> raw = {};
  memcpy(&raw, stored, sizeof stored);
  return raw;
}

template <int kCount>
__device__ __forceinline__ Raw<kCount> pack(DType dtype, const float (&values)[kCount]) {
  if (dtype == DType::kFloat32) return pack_as<float>(values);
  if (dtype == DType::kBFloat16) return pack_as<__nv_bfloat16>(values);
  return pack_as<__half>(values);
}

// What is left of the values once they are stored as `dtype`.
template <int kCount>
__device__ __forceinline__ void round_to(DType dtype, float (&values)[kCount]) {
  if (dtype != DType::kFloat32) unpack(dtype, pack(dtype, values), values);
}

// --- Contiguous samples ----------------------------------------------------------------------------

// The pieces of all samples, which `together` threads take at a time: the first, and then every so
// many of the grid. One division at the start, in 32 bits: 2^34 elements are 2^28 pieces.
struct Walk {
  int64_t sample;
  unsigned piece;

  __device__ __forceinline__ Walk(unsigned pieces, unsigned together) : pieces(pieces) {
    const unsigned first = (blockIdx.x * kThreads + threadIdx.x) / together;
    const unsigned stride = gridDim.x * (kThreads / together);
    sample = first / pieces;
    piece = first % pieces;
    more_samples = stride / pieces;
    more_pieces = stride % pieces;
  }

  __device__ __forceinline__ void advance() {
    sample += more_samples;
    piece += more_pieces;
    if (piece >= pieces) {
      piece -= pieces;
      ++sample;
    }
  }

 private:
  unsigned pieces, more_samples, more_pieces;
};

// A thread's two quads of a sample, by their first elements in memory's order. Where an operand is
// narrow they are neighbours; where all are float32 each quad stands beside the next thread's, so
// that every access of eight threads is one line.
struct Span {
  int64_t element[2];
  bool inside[2];

  __device__ __forceinline__ Span(int64_t begin, int64_t end, unsigned thread, bool neighbours) {
    const unsigned lane = thread % kGroup;
    const int64_t group = begin + thread / kGroup * (kGroup * kEach);
    element[0] = group + (neighbours ? kEach : 4) * lane;
    element[1] = element[0] + (neighbours ? 4 : 4 * kGroup);
    inside[0] = element[0] < end;
    inside[1] = element[1] < end;
  }
};

using Octet = Raw<kEach>;

__device__ __forceinline__ unsigned char* address(const Operand& operand, int64_t sample,
                                                  int64_t element) {
  const int bytes = operand.layout.dtype == DType::kFloat32 ? 4 : 2;
  return static_cast<unsigned char*>(operand.at) +
         (sample * operand.layout.sample + element) * bytes;
}

// All operands' loads are issued before the first is waited for: the bits now, floats later.
__device__ __forceinline__ Octet load_octet(const Operand& from, int64_t sample,
                                            const Span& span) {
  Octet raw = {};
  uint4* parts = reinterpret_cast<uint4*>(&raw);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (span.inside[half] && (half == 0 || from.layout.dtype == DType::kFloat32)) {
      parts[half] = load_streaming(
          reinterpret_cast<const uint4*>(address(from, sample, span.element[half])));
    }
  }
  return raw;
}

__device__ __forceinline__ void store_octet(const Operand& to, int64_t sample, const Span& span,
                                            const float (&values)[kEach]) {
  const Octet raw = pack(to.layout.dtype, values);
  const uint4* parts = reinterpret_cast<const uint4*>(&raw);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (span.inside[half] && (half == 0 || to.layout.dtype == DType::kFloat32)) {
      store_streaming(reinterpret_cast<uint4*>(address(to, sample, span.element[half])),
                      parts[half]);
    }
  }
}

struct Tiling {
  unsigned pieces;     // of a sample
  unsigned elements;   // of a piece
  bool neighbours;     // Span
};

// Noise of the positions [first_position, …) of all channels, into memory's order; `count` elements.
__device__ __forceinline__ void draw_across(const Start& start, const Shape& shape,
                                            uint64_t number, int64_t first_position, unsigned count,
                                            float* noise) {
  const unsigned channels = static_cast<unsigned>(shape.channels);
  for (unsigned i = threadIdx.x; i < count / 4; i += kThreads) {
    const unsigned position = i / channels * 4;
    const unsigned channel = i % channels;
    const int64_t element = channel * shape.spatial + first_position + position;
    const Normals4 normals =
        normals_of(philox_words(start.seed, start.counter_step, number, static_cast<uint32_t>(element / 4)));
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      noise[(position + lane) * channels + channel] = normals.n[lane];
    }
  }
}

template <typename Op, bool kAcross>
__global__ void __launch_bounds__(kThreads, Op::kBlocks)
    flat_kernel(const __grid_constant__ Work<Op> work, const Tiling tiling) {
  const auto start = work.op.start();
  const int64_t elements = work.shape.channels * work.shape.spatial;
  constexpr unsigned kTogether = kAcross ? kThreads : kGroup;

  for (Walk at(tiling.pieces, kTogether); at.sample < work.shape.samples; at.advance()) {
    const int64_t begin = static_cast<int64_t>(at.piece) * tiling.elements;
    const int64_t end = begin + tiling.elements < elements ? begin + tiling.elements : elements;
    const Span span(begin, end, threadIdx.x % kTogether, tiling.neighbours);
    Octet raw[Op::kInputs] = {};
#pragma unroll
    for (int i = 0; i < Op::kInputs; ++i) {
      if (start.has(i)) raw[i] = load_octet(work.in[i], at.sample, span);
    }
    const auto row = work.op.row(start, at.sample);

    float in[Op::kInputs][kEach];
#pragma unroll
    for (int i = 0; i < Op::kInputs; ++i) unpack(work.in[i].layout.dtype, raw[i], in[i]);
    if (start.draws) {
      const uint64_t number = work.first_sample + static_cast<uint64_t>(at.sample);
      float(&noise)[kEach] = in[Op::kNoise];
      if constexpr (kAcross) {
        float* drawn = reinterpret_cast<float*>(shared_memory());
        __syncthreads();  // the tile before has been read
        draw_across(start, work.shape, number, begin / work.shape.channels,
                    static_cast<unsigned>(end - begin), drawn);
        __syncthreads();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (span.inside[half]) memcpy(noise + 4 * half, drawn + (span.element[half] - begin), 16);
        }
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto quad = static_cast<uint32_t>(span.element[half] / 4);
          const Normals4 normals = normals_of(philox_words(start.seed, start.counter_step, number, quad));
          memcpy(noise + 4 * half, normals.n, 16);
        }
      }
      round_to(work.drawn_as, noise);
    }
    float out[Op::kOutputs][kEach];
    work.op.apply(start, row, in, out);
#pragma unroll
    for (int i = 0; i < Op::kOutputs; ++i) {
      if (work.out[i].at != nullptr) store_octet(work.out[i], at.sample, span, out[i]);
    }
  }
}

// --- Any strides -----------------------------------------------------------------------------------

// The four elements of one counter, of which the last ones may be beyond the sample.
struct Quad {
  int64_t sample;
  uint32_t counter;
  int64_t channel, position;  // of the first
  int count;
  bool one_run;  // all four in one channel
};

// Where spatial % 4 == 0, neighbouring threads take the channels of the same positions: what stands
// channels_last is then read and written in whole lines, and the rest four elements at a time.
__device__ __forceinline__ Quad quad_of(const Shape& shape, int64_t quads, int64_t item) {
  Quad quad;
  quad.sample = item / quads;
  const int64_t i = item - quad.sample * quads;
  if (shape.spatial % 4 == 0) {
    const int64_t four = i / shape.channels;
    quad.channel = i - four * shape.channels;
    quad.position = 4 * four;
    quad.counter = static_cast<uint32_t>(quad.channel * (shape.spatial / 4) + four);
    quad.count = 4;
    quad.one_run = true;
  } else {
    const int64_t left = shape.channels * shape.spatial - 4 * i;
    quad.channel = 4 * i / shape.spatial;
    quad.position = 4 * i - quad.channel * shape.spatial;
    quad.counter = static_cast<uint32_t>(i);
    quad.count = left < 4 ? static_cast<int>(left) : 4;
    quad.one_run = quad.count == 4 && quad.position + 4 <= shape.spatial;
  }
  return quad;
}

// Calls each(lane, offset) for the elements of a quad, or all(offset) where one access holds them.
template <typename Bits, typename All, typename Each>
__device__ __forceinline__ void visit(const Operand& operand, const Shape& shape, const Quad& quad,
                                      const All& all, const Each& each) {
  const Layout& layout = operand.layout;
  const int64_t sample = quad.sample * layout.sample;
  const int64_t first = sample + quad.channel * layout.channel + quad.position * layout.spatial;
  const auto at = reinterpret_cast<uintptr_t>(static_cast<Bits*>(operand.at) + first);
  if (layout.spatial == 1 && quad.one_run && at % (4 * sizeof(Bits)) == 0) return all(first);
  int64_t channel = quad.channel, position = quad.position;
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {
    if (lane < quad.count) {
      each(lane, sample + channel * layout.channel + position * layout.spatial);
    }
    if (++position == shape.spatial) {
      position = 0;
      ++channel;
    }
  }
}

template <typename Bits>
__device__ __forceinline__ Raw<4> load_as(const Operand& from, const Shape& shape,
                                          const Quad& quad) {
  const auto* base = static_cast<const Bits*>(from.at);
  Pack<Bits, 4> bits = {};
  visit<Bits>(
      from, shape, quad,
      [&](int64_t first) {
        bits = load_streaming(reinterpret_cast<const Pack<Bits, 4>*>(base + first));
      },
      [&](int lane, int64_t offset) { bits.value[lane] = base[offset]; });
  Raw<4> raw = {};
  memcpy(&raw, &bits, sizeof bits);
  return raw;
}

template <typename Bits>
__device__ __forceinline__ void store_as(const Operand& to, const Shape& shape, const Quad& quad,
                                         const Raw<4>& raw) {
  auto* base = static_cast<Bits*>(to.at);
  Pack<Bits, 4> bits;
  memcpy(&bits, &raw, sizeof bits);
  visit<Bits>(
      to, shape, quad,
      [&](int64_t first) {
        store_streaming(reinterpret_cast<Pack<Bits, 4>*>(base + first), bits);
      },
      [&](int lane, int64_t offset) { base[offset] = bits.value[lane]; });
}

template <typename Op>
__global__ void __launch_bounds__(kThreads, Op::kBlocks)
    strided_kernel(const __grid_constant__ Work<Op> work) {
  const auto start = work.op.start();
  const int64_t quads = (work.shape.channels * work.shape.spatial + 3) / 4;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;

  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       item < work.shape.samples * quads; item += stride) {
    const Quad quad = quad_of(work.shape, quads, item);
    Raw<4> raw[Op::kInputs] = {};
#pragma unroll
    for (int i = 0; i < Op::kInputs; ++i) {
      if (!start.has(i)) continue;
      raw[i] = work.in[i].layout.dtype == DType::kFloat32
                   ? load_as<uint32_t>(work.in[i], work.shape, quad)
                   : load_as<uint16_t>(work.in[i], work.shape, quad);
    }
    const auto row = work.op.row(start, quad.sample);

    float in[Op::kInputs][4];
#pragma unroll
    for (int i = 0; i < Op::kInputs; ++i) unpack(work.in[i].layout.dtype, raw[i], in[i]);
    if (start.draws) {
      const uint64_t number = work.first_sample + static_cast<uint64_t>(quad.sample);
      const Normals4 normals =
          normals_of(philox_words(start.seed, start.counter_step, number, quad.counter));
      memcpy(in[Op::kNoise], normals.n, sizeof normals.n);
      round_to(work.drawn_as, in[Op::kNoise]);
    }
    float out[Op::kOutputs][4];
    work.op.apply(start, row, in, out);
#pragma unroll
    for (int i = 0; i < Op::kOutputs; ++i) {
      const Operand& to = work.out[i];
      if (to.at == nullptr) continue;
      const Raw<4> bits = pack(to.layout.dtype, out[i]);
      if (to.layout.dtype == DType::kFloat32) {
        store_as<uint32_t>(to, work.shape, quad, bits);
      } else {
        store_as<uint16_t>(to, work.shape, quad, bits);
      }
    }
  }
}

// --- Launching -------------------------------------------------------------------------------------

template <typename Op, typename Predicate>
bool all_operands(const Work<Op>& work, const Predicate& holds) {
  const auto absent_or_holds = [&](const Operand& o) { return o.at == nullptr || holds(o); };
  for (const Operand& o : work.in) {
    if (!absent_or_holds(o)) return false;
  }
  for (const Operand& o : work.out) {
    if (!absent_or_holds(o)) return false;
  }
  return true;
}

// Whether all samples stand in one order of memory without gaps, and 128-bit accesses reach them.
template <typename Op>
bool is_flat(const Work<Op>& work, bool neighbours) {
  const Shape& shape = work.shape;
  if (shape.channels * shape.spatial % (neighbours ? kEach : 4) != 0) return false;
  return all_operands(work, [&](const Operand& o) {
    const int64_t bytes = o.layout.dtype == DType::kFloat32 ? 4 : 2;
    const bool dense = o.layout.spatial == shape.channels &&
                       (shape.channels == 1 || o.layout.channel == 1);
    return dense && is_aligned(o.at, kAccessBytes) &&
           (shape.samples == 1 || o.layout.sample * bytes % kAccessBytes == 0);
  });
}

// The elements of a block's tile in across: whole counters of every channel, whole octets; 0 where
// there is no such tile.
inline unsigned across_tile(const Shape& shape) {
  if (shape.spatial % 4 != 0) return 0;
  const int64_t unit = 4 * shape.channels * (shape.channels % 2 == 0 ? 1 : 2);
  return static_cast<unsigned>(kTile / unit * unit);
}

template <typename Op>
void run(const char* name, const Work<Op>& work, const Target& on) {
  const int64_t elements = work.shape.channels * work.shape.spatial;
  if (elements == 0 || work.shape.samples == 0) return;
  const bool neighbours =
      !all_operands(work, [](const Operand& o) { return o.layout.dtype == DType::kFloat32; });
  const auto blocks = [&](int64_t wanted, int64_t in_a_block) {
    const int64_t needed = (wanted + in_a_block - 1) / in_a_block;
    const int64_t held = static_cast<int64_t>(on.multiprocessors) * Op::kBlocks;
    return dim3(static_cast<unsigned>(needed < held ? needed : held));
  };
  const auto tiling = [&](unsigned piece) {
    return Tiling{static_cast<unsigned>((elements + piece - 1) / piece), piece, neighbours};
  };
  const bool flat = is_flat(work, neighbours);
  const unsigned tile = across_tile(work.shape);
  if (flat && (work.shape.channels == 1 || !work.draws)) {
    const Tiling cut = tiling(kGroup * kEach);
    const Launch how = {name, blocks(work.shape.samples * cut.pieces, kThreads / kGroup), kThreads,
                        on.stream};
    launch<flat_kernel<Op, false>>(how, work, cut);
  } else if (flat && tile > 0) {
    const Tiling cut = tiling(tile);
    const Launch how = {name, blocks(work.shape.samples * cut.pieces, 1), kThreads, on.stream,
                        tile * sizeof(float)};
    launch<flat_kernel<Op, true>>(how, work, cut);
  } else {
    const Launch how = {name, blocks(work.shape.samples * ((elements + 3) / 4), kThreads), kThreads,
                        on.stream};
    launch<strided_kernel<Op>>(how, work);
  }
}

}  // namespace fastdiff::cuda

// Elementwise kernels over samples of (channels, spatial) (common/elementwise.h): which thread
// computes which elements, in accesses as wide as the operands' layouts allow, with noise drawn in
// registers.
//
// An operation is a struct Op with
//   kInputs, kOutputs, kNoise   operands; which input is the noise, drawn or given
//   kBlocks                     blocks of kThreads that a multiprocessor has registers for
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
#include "call.h"
#include "device.h"
#include "fast_normal.h"
#include "launch.h"
#include "operand.h"

namespace fastdiff::cuda {

constexpr int kThreads = 128;
constexpr int kTile = kThreads * kEach;  // elements of a block
static_assert(kThreads % kGroup == 0);

// What every operation's start() says: which inputs are read, bit i for input i, and whether and
// from which counters noise is drawn.
struct Start {
  unsigned reads;
  bool draws;
  uint64_t seed;
  uint32_t counter_step;

  __device__ __forceinline__ bool has(int input) const { return (reads >> input & 1u) != 0; }
};

// A counter's four elements of the sample that has this number.
__device__ __forceinline__ Normals4 drawn_quad(const Start& start, uint64_t number, uint32_t quad) {
  return fast_normals_of(philox_words(start.seed, start.counter_step, number, quad));
}

template <typename Op>
struct Work {
  Op op;
  Shape shape;
  Operand in[Op::kInputs];
  Operand out[Op::kOutputs];
  DType drawn_as;  // what drawn noise is rounded to
  bool draws;
  uint64_t first_sample;
  const uint64_t* first_sample_address;  // overrides it

  // Read anew for every tile: kept, it would cost two registers that q_sample does not have.
  __device__ __forceinline__ uint64_t number(int64_t sample) const {
    const uint64_t first = first_sample_address != nullptr ? *first_sample_address : first_sample;
    return first + static_cast<uint64_t>(sample);
  }
};

// --- Contiguous samples --------------------------------------------------------------------------

// The pieces of all samples, which `together` threads take at a time: the first, and then every so
// many of the grid. One division at the start, in 32 bits: 2^34 elements are 2^28 pieces, and samples
// of four elements at least are fewer than memory has bytes for 2^32 of.
struct Walk {
  unsigned sample;
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

struct Tiling {
  unsigned pieces;    // of a sample
  unsigned elements;  // of a piece
  bool neighbours;    // Span
};

// Noise of `count` elements, those of all channels at a piece's positions, in memory's order.
__device__ __forceinline__ void draw_across(const Start& start, const Shape& shape, uint64_t number,
                                            unsigned piece, unsigned piece_elements, unsigned count,
                                            float* noise) {
  const unsigned channels = static_cast<unsigned>(shape.channels);
  const unsigned quads = static_cast<unsigned>(shape.spatial / 4);  // of a channel
  const unsigned first = piece * (piece_elements / 4 / channels);
  for (unsigned i = threadIdx.x; i < count / 4; i += kThreads) {
    const unsigned position = i / channels;  // of four
    const unsigned channel = i % channels;
    const Normals4 normals = drawn_quad(start, number, channel * quads + first + position);
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      noise[(4 * position + lane) * channels + channel] = normals.n[lane];
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
    // In flight while noise is drawn, where the drawing leaves registers for it.
    decltype(work.op.row(start, 0)) row = {};
    if constexpr (!kAcross) row = work.op.row(start, at.sample);

    float in[Op::kInputs][kEach];
#pragma unroll
    for (int i = 0; i < Op::kInputs; ++i) unpack(work.in[i].layout.dtype, raw[i], in[i]);
    if (start.draws) {
      const uint64_t number = work.number(at.sample);
      float (&noise)[kEach] = in[Op::kNoise];
      if constexpr (kAcross) {
        float* drawn = reinterpret_cast<float*>(shared_memory());
        __syncthreads();  // the tile before has been read
        draw_across(start, work.shape, number, at.piece, tiling.elements,
                    static_cast<unsigned>(end - begin), drawn);
        __syncthreads();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (span.inside[half]) memcpy(noise + 4 * half, drawn + (span.element[half] - begin), 16);
        }
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Normals4 normals =
              drawn_quad(start, number, static_cast<uint32_t>(span.element[half] / 4));
          memcpy(noise + 4 * half, normals.n, 16);
        }
      }
      round_to(work.drawn_as, noise);
    }
    if constexpr (kAcross) row = work.op.row(start, at.sample);
    float out[Op::kOutputs][kEach];
    work.op.apply(start, row, in, out);
#pragma unroll
    for (int i = 0; i < Op::kOutputs; ++i) {
      if (work.out[i].at != nullptr) store_octet(work.out[i], at.sample, span, out[i]);
    }
  }
}

// --- Any strides ---------------------------------------------------------------------------------

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
      const uint64_t number = work.number(quad.sample);
      const Normals4 normals = drawn_quad(start, number, static_cast<uint32_t>(quad.counter));
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

// --- Launching -----------------------------------------------------------------------------------

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
    const bool dense =
        o.layout.spatial == shape.channels && (shape.channels == 1 || o.layout.channel == 1);
    return dense && is_aligned(o.at, kAccessBytes) &&
           (shape.samples == 1 || o.layout.sample * bytes_of(o.layout.dtype) % kAccessBytes == 0);
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

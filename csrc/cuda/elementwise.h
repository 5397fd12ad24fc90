// Elementwise kernels over samples of (channels, spatial) (common/elementwise.h): which thread
// computes which elements, in accesses as wide as the operands' layouts allow, with noise drawn in
// registers.
//
// An operation is a struct Op with
//   kInputs, kOutputs, kNoise   operands, of which the first ones are always there; which input is
//                               the noise, drawn or given
//   kRoundsNoise                whether drawn noise is rounded to the first input's dtype
//   kBlocks                     blocks of kThreads that a multiprocessor has registers for
//   Start start()               what it reads from the device once, and what it then needs
//   Row row(start, sample)      what it reads for one sample
//   bool writes(start, output)  whether an output, where there is one, is written
//   apply(start, row, read, noise, out)
//                               the arithmetic on elements in registers; read(i, values) unpacks an
//                               input that start() says is read: unpacked beforehand, those that
//                               are not would take registers and instructions too
//
// Three kernels, of which run() chooses:
//   flat     contiguous samples: two 128-bit accesses of each operand, for one storage type of all
//            operands and for Mixed ones (operand.h)
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
constexpr int64_t kMostFlat = int64_t{1} << 30;  // elements of a sample
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

// Where a block in across draws for its threads.
__device__ __forceinline__ float* drawn() { return reinterpret_cast<float*>(shared_memory()); }

// The normals of a thread's octet, drawn by itself or by its block.
template <typename T>
__device__ __forceinline__ void draw_octet(const Start& start, uint64_t number, const Span<T>& span,
                                           int octet, float (&noise)[kOctet]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Normals4 normals = drawn_quad(start, number, span.quad(octet, half) / 4);
    memcpy(noise + 4 * half, normals.n, sizeof normals.n);
  }
}

template <typename T>
__device__ __forceinline__ void take_octet(const float* drawn, unsigned begin, const Span<T>& span,
                                           int octet, float (&noise)[kOctet]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (span.has(octet, half))
      memcpy(noise + 4 * half, drawn + (span.quad(octet, half) - begin), 16);
  }
}

template <typename Op, typename T, bool kAcross>
__global__ void __launch_bounds__(kThreads, Op::kBlocks)
    flat_kernel(const __grid_constant__ Work<Op> work, const Tiling tiling) {
  const auto start = work.op.start();
  const unsigned samples = static_cast<unsigned>(work.shape.samples);
  const unsigned elements = static_cast<unsigned>(work.shape.channels * work.shape.spatial);
  constexpr unsigned kTogether = kAcross ? kThreads : kGroup;

  for (Walk at(tiling.pieces, kTogether); at.sample < samples; at.advance()) {
    const unsigned begin = at.piece * tiling.elements;
    unsigned end = elements;
    if (kAcross && begin + tiling.elements < end) end = begin + tiling.elements;
    const Span<T> span(begin, end, threadIdx.x % kTogether);
    Octet raw[Span<T>::kOctets][Op::kInputs] = {};
#pragma unroll
    for (int i = 0; i < Op::kInputs; ++i) {
      if (!start.has(i)) continue;
#pragma unroll
      for (int octet = 0; octet < Span<T>::kOctets; ++octet) {
        load_octet(work.in[i], at.sample, span, octet, raw[octet][i]);
      }
    }
    // In flight while noise is drawn, where the drawing leaves registers for it.
    decltype(work.op.row(start, 0)) row = {};
    if constexpr (!kAcross) row = work.op.row(start, at.sample);
    const uint64_t number = start.draws ? work.number(at.sample) : 0;
    if (kAcross && start.draws) {
      __syncthreads();  // the tile before has been read
      draw_across(start, work.shape, number, at.piece, tiling.elements, end - begin, drawn());
      __syncthreads();
    }
    if constexpr (kAcross) row = work.op.row(start, at.sample);

#pragma unroll
    for (int octet = 0; octet < Span<T>::kOctets; ++octet) {
      const auto read = [&](int i, float (&values)[kOctet]) {
        unpack(dtype_of<T>(work.in[i]), raw[octet][i], values);
      };
      float noise[kOctet] = {};
      if (start.draws) {
        if constexpr (kAcross) {
          take_octet(drawn(), begin, span, octet, noise);
        } else {
          draw_octet(start, number, span, octet, noise);
        }
        if (Op::kRoundsNoise) round_to(dtype_of<T>(work.in[0]), noise);
      } else if (start.has(Op::kNoise)) {
        read(Op::kNoise, noise);
      }
      float out[Op::kOutputs][kOctet];
      work.op.apply(start, row, read, noise, out);
#pragma unroll
      for (int i = 0; i < Op::kOutputs; ++i) {
        if (i == 0 || (work.out[i].at != nullptr && work.op.writes(start, i))) {
          store_octet(work.out[i], at.sample, span, octet, out[i]);
        }
      }
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

    const auto read = [&](int i, float (&values)[4]) {
      unpack(work.in[i].layout.dtype, raw[i], values);
    };
    float noise[4] = {};
    if (start.draws) {
      const uint64_t number = work.number(quad.sample);
      const Normals4 normals = drawn_quad(start, number, static_cast<uint32_t>(quad.counter));
      memcpy(noise, normals.n, sizeof noise);
      if (Op::kRoundsNoise) round_to(work.in[0].layout.dtype, noise);
    } else if (start.has(Op::kNoise)) {
      read(Op::kNoise, noise);
    }
    float out[Op::kOutputs][4];
    work.op.apply(start, row, read, noise, out);
#pragma unroll
    for (int i = 0; i < Op::kOutputs; ++i) {
      const Operand& to = work.out[i];
      if (to.at == nullptr || !work.op.writes(start, i)) continue;
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

// Whether all samples stand in one order of memory without gaps, 128-bit accesses reach them, and
// 32 bits hold their elements' offsets.
template <typename Op>
bool is_flat(const Work<Op>& work) {
  const Shape& shape = work.shape;
  const int64_t elements = shape.channels * shape.spatial;
  return elements <= kMostFlat && all_operands(work, [&](const Operand& o) {
           const int64_t size = bytes_of(o.layout.dtype);
           const bool dense =
               o.layout.spatial == shape.channels && (shape.channels == 1 || o.layout.channel == 1);
           return dense && is_aligned(o.at, kAccessBytes) && elements * size % kAccessBytes == 0 &&
                  (shape.samples == 1 || o.layout.sample * size % kAccessBytes == 0);
         });
}

// The elements of a block's tile in across: whole counters of every channel, whole octets; 0 where
// there is no such tile.
template <typename T>
unsigned across_tile(const Shape& shape) {
  if (shape.spatial % 4 != 0) return 0;
  const int64_t unit = 4 * shape.channels * (shape.channels % 2 == 0 ? 1 : 2);
  return static_cast<unsigned>(kThreads * Span<T>::kElements / unit * unit);
}

// Calls visit(T{}) with the storage type of all operands, or with Mixed{}.
template <typename Op, typename Visit>
void with_one_type(const Work<Op>& work, const Visit& visit) {
  const DType first = work.in[0].layout.dtype;
  if (all_operands(work, [&](const Operand& o) { return o.layout.dtype == first; })) {
    with_type(first, visit);
  } else {
    visit(Mixed{});
  }
}

template <typename Op>
void run(const char* name, const Work<Op>& work, const Target& on) {
  const Shape& shape = work.shape;
  const int64_t elements = shape.channels * shape.spatial;
  if (elements == 0 || shape.samples == 0) return;
  const auto blocks = [&](int64_t wanted, int64_t in_a_block) {
    const int64_t needed = (wanted + in_a_block - 1) / in_a_block;
    const int64_t held = static_cast<int64_t>(on.multiprocessors) * Op::kBlocks;
    return dim3(static_cast<unsigned>(needed < held ? needed : held));
  };
  const auto tiling = [&](unsigned piece) {
    return Tiling{static_cast<unsigned>((elements + piece - 1) / piece), piece};
  };
  bool done = false;
  if (is_flat(work)) {
    with_one_type(work, [&](auto type) {
      using T = decltype(type);
      const unsigned tile = across_tile<T>(shape);
      if (shape.channels == 1 || !work.draws) {
        const Tiling cut = tiling(kGroup * Span<T>::kElements);
        const Launch how = {name, blocks(shape.samples * cut.pieces, kThreads / kGroup), kThreads,
                            on.stream};
        launch<flat_kernel<Op, T, false>>(how, work, cut);
        done = true;
      } else if (tile > 0) {
        const Tiling cut = tiling(tile);
        const Launch how = {name, blocks(shape.samples * cut.pieces, 1), kThreads, on.stream,
                            tile * sizeof(float)};
        launch<flat_kernel<Op, T, true>>(how, work, cut);
        done = true;
      }
    });
  }
  if (done) return;
  const Launch how = {name, blocks(shape.samples * ((elements + 3) / 4), kThreads), kThreads,
                      on.stream};
  launch<strided_kernel<Op>>(how, work);
}

}  // namespace fastdiff::cuda

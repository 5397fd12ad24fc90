// Operands of elementwise kernels (common/elementwise.h): their bits into registers and back, eight
// elements a thread in 128-bit accesses, or four of any strides. Dtypes are looked at as the kernel
// runs; all threads take the same branch.
#pragma once

#include "../common/elementwise.h"
#include "vec.h"

namespace fastdiff::cuda {

constexpr int kEach = 8;   // elements of a thread: two counters'
constexpr int kGroup = 8;  // neighbouring threads whose accesses fill a 128-byte line

struct Operand {
  void* at;  // null: not there
  Layout layout;
};

// The operand at some elements from its beginning; nowhere where it is not wanted.
inline Operand operand(const void* base, const Layout& layout, int64_t offset = 0,
                       bool wanted = true) {
  if (base == nullptr || !wanted) return {nullptr, layout};
  auto* bytes = static_cast<unsigned char*>(const_cast<void*>(base));
  return {bytes + offset * bytes_of(layout.dtype), layout};
}

// --- Values in registers -------------------------------------------------------------------------

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

// --- Eight elements of a contiguous sample -------------------------------------------------------

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

__device__ __forceinline__ uint4* address(const Operand& operand, int64_t sample, int64_t element) {
  const int64_t offset = sample * operand.layout.sample + element;
  return reinterpret_cast<uint4*>(static_cast<unsigned char*>(operand.at) +
                                  offset * bytes_of(operand.layout.dtype));
}

// float32 takes an access for each quad, narrower ones hold both in the first's.
__device__ __forceinline__ bool accesses(const Operand& operand, const Span& span, int half) {
  return span.inside[half] && (half == 0 || operand.layout.dtype == DType::kFloat32);
}

// All operands' loads are issued before the first is waited for: the bits now, floats later.
__device__ __forceinline__ Octet load_octet(const Operand& from, int64_t sample, const Span& span) {
  Octet raw = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!accesses(from, span, half)) continue;
    const uint4 bits = load_streaming(address(from, sample, span.element[half]));
    memcpy(raw.word + 4 * half, &bits, sizeof bits);
  }
  return raw;
}

__device__ __forceinline__ void store_octet(const Operand& to, int64_t sample, const Span& span,
                                            const float (&values)[kEach]) {
  const Octet raw = pack(to.layout.dtype, values);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!accesses(to, span, half)) continue;
    uint4 bits;
    memcpy(&bits, raw.word + 4 * half, sizeof bits);
    store_streaming(address(to, sample, span.element[half]), bits);
  }
}

// --- Four elements of any strides ----------------------------------------------------------------

// The four elements of one counter, of which the last ones may be beyond the sample.
struct Quad {
  int64_t sample;
  int64_t counter;
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
    quad.counter = quad.channel * (shape.spatial / 4) + four;
    quad.count = 4;
    quad.one_run = true;
  } else {
    const int64_t left = shape.channels * shape.spatial - 4 * i;
    quad.channel = 4 * i / shape.spatial;
    quad.position = 4 * i - quad.channel * shape.spatial;
    quad.counter = i;
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
      [&](int64_t first) { store_streaming(reinterpret_cast<Pack<Bits, 4>*>(base + first), bits); },
      [&](int lane, int64_t offset) { base[offset] = bits.value[lane]; });
}

}  // namespace fastdiff::cuda

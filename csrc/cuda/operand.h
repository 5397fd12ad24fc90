// Operands of elementwise kernels (common/elementwise.h): their bits into registers and back, octets
// of elements in 128-bit accesses, or four of any strides. Dtypes that are not one storage type are
// looked at as the kernel runs; all threads take the same branch.
#pragma once

#include <type_traits>

#include "../common/elementwise.h"
#include "vec.h"

namespace fastdiff::cuda {

constexpr int kOctet = 8;  // elements that are computed together: two counters'
constexpr int kGroup = 8;  // neighbouring threads whose accesses fill a 128-byte line

struct Operand {
  void* at;  // null: not there
  Layout layout;
  uint64_t sample_bytes;  // from one sample to the next
};

// The operand at some elements from its beginning; nowhere where it is not wanted.
inline Operand operand(const void* base, const Layout& layout, int64_t offset = 0,
                       bool wanted = true) {
  if (base == nullptr || !wanted) return {nullptr, layout, 0};
  auto* bytes = static_cast<unsigned char*>(const_cast<void*>(base));
  return {bytes + offset * bytes_of(layout.dtype), layout,
          static_cast<uint64_t>(layout.sample * bytes_of(layout.dtype))};
}

// --- Values in registers -------------------------------------------------------------------------

// Elements' bits as they stand in memory: float32 fills all of it, narrower ones the front.
template <int kCount>
struct alignas(kAccessBytes) Raw {
  uint32_t word[kCount];
};

using Octet = Raw<kOctet>;

template <typename T, int kCount>
__device__ __forceinline__ void unpack_as(const Raw<kCount>& raw, float (&values)[kCount]) {
  Pack<T, kCount> stored;
  memcpy(&stored, &raw, sizeof stored);
  unpack(stored, values);
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
  const Pack<T, kCount> stored = packed<T>(values);
  Raw<kCount> raw = {};
  memcpy(&raw, &stored, sizeof stored);
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

// --- Octets of a contiguous sample ---------------------------------------------------------------

// In place of a storage type where operands differ in theirs.
struct Mixed {};

// What a thread takes of each operand of a contiguous sample: two accesses, or of a narrow operand
// among Mixed ones the first. Accesses of one type are a line apart, each beside the next thread's, so
// that eight threads' fill the line; Mixed operands' are eight neighbours.
template <typename T>
struct Span {
  static constexpr bool kMixed = std::is_same_v<T, Mixed>;
  static constexpr unsigned kAccess = kAccessBytes / (sizeof(T) == 2 ? 2 : 4);  // elements
  static constexpr unsigned kApart = kMixed ? kAccess : kAccess * kGroup;
  static constexpr unsigned kElements = 2 * kAccess;
  static constexpr int kOctets = kElements / kOctet;

  unsigned first;
  bool inside[2];

  __device__ __forceinline__ Span(unsigned begin, unsigned end, unsigned thread) {
    const unsigned lane = thread % kGroup;
    first = begin + thread / kGroup * (kGroup * kElements) + lane * (kMixed ? kElements : kAccess);
    inside[0] = first < end;
    // Narrow operands' samples are whole octets.
    inside[1] = kMixed ? inside[0] : first + kApart < end;
  }

  // The first element of each half of an octet.
  __device__ __forceinline__ unsigned quad(int octet, int half) const {
    return first + (kOctets == 2 ? octet * kApart + half * 4 : half * kApart);
  }
  __device__ __forceinline__ bool has(int octet, int half) const {
    return inside[kOctets == 2 ? octet : half];
  }
};

template <typename T>
__device__ __forceinline__ DType dtype_of(const Operand& operand) {
  if constexpr (std::is_same_v<T, Mixed>) {
    return operand.layout.dtype;
  } else {
    return code_of(T{});
  }
}

// Calls each(half, at) for the accesses of an octet: float32 takes one for each half, narrower ones
// hold both in the first's.
template <typename T, typename Each>
__device__ __forceinline__ void visit_octet(const Operand& operand, unsigned sample,
                                            const Span<T>& span, int octet, const Each& each) {
  const DType dtype = dtype_of<T>(operand);
  auto* at = static_cast<unsigned char*>(operand.at) + sample * operand.sample_bytes +
             static_cast<uint64_t>(span.first) * static_cast<unsigned>(bytes_of(dtype));
  if (Span<T>::kOctets == 2) at += octet * kGroup * kAccessBytes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half == 1 && dtype != DType::kFloat32) break;
    if (span.has(octet, half)) each(half, reinterpret_cast<uint4*>(at));
    at += Span<T>::kMixed ? kAccessBytes : kGroup * kAccessBytes;
  }
}

// All operands' loads are issued before the first is waited for: the bits now, floats later.
template <typename T>
__device__ __forceinline__ void load_octet(const Operand& from, unsigned sample,
                                           const Span<T>& span, int octet, Octet& raw) {
  visit_octet(from, sample, span, octet, [&](int half, const uint4* at) {
    const uint4 bits = load_streaming(at);
    memcpy(raw.word + 4 * half, &bits, sizeof bits);
  });
}

template <typename T>
__device__ __forceinline__ void store_octet(const Operand& to, unsigned sample, const Span<T>& span,
                                            int octet, const float (&values)[kOctet]) {
  const Octet raw = pack(dtype_of<T>(to), values);
  visit_octet(to, sample, span, octet, [&](int half, uint4* at) {
    uint4 bits;
    memcpy(&bits, raw.word + 4 * half, sizeof bits);
    store_streaming(at, bits);
  });
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

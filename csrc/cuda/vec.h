// Reading and writing memory 16 bytes at a time, in the storage types of every kernel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../common/dtype.h"
#include "../common/lanes.h"
#include "device_limits.h"

namespace fastdiff::cuda {

// How many elements one access holds.
template <typename T>
constexpr int kWide = kAccessBytes / static_cast<int>(sizeof(T));

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T value[kCount];
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

// Two elements of 16 bits, as one register holds them.
__device__ __forceinline__ float2 to_floats(__nv_bfloat162 two) {
  uint32_t bits;
  memcpy(&bits, &two, sizeof bits);
  return {Lanes<float>::float_of(bits << 16), Lanes<float>::float_of(bits & 0xFFFF0000u)};
}
__device__ __forceinline__ float2 to_floats(__half2 two) { return __half22float2(two); }
__device__ __forceinline__ __nv_bfloat162 from_floats(float x, float y, __nv_bfloat16) {
  return __floats2bfloat162_rn(x, y);
}
__device__ __forceinline__ __half2 from_floats(float x, float y, __half) {
  return __floats2half2_rn(x, y);
}

template <typename T, int kCount>
constexpr bool kInPairs = sizeof(T) == 2 && kCount % 2 == 0;

template <typename T, int kCount>
__device__ __forceinline__ void unpack(const Pack<T, kCount>& pack, float (&values)[kCount]) {
  if constexpr (kInPairs<T, kCount>) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      decltype(from_floats(0.0f, 0.0f, T{})) two;
      memcpy(&two, &pack.value[i], sizeof two);
      const float2 floats = to_floats(two);
      values[i] = floats.x;
      values[i + 1] = floats.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = to_float(pack.value[i]);
  }
}

template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> packed(const float (&values)[kCount]) {
  Pack<T, kCount> pack;
  if constexpr (kInPairs<T, kCount>) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const auto two = from_floats(values[i], values[i + 1], T{});
      memcpy(&pack.value[i], &two, sizeof two);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.value[i] = from_float<T>(values[i]);
  }
  return pack;
}

// The built-in type of a size, which CUDA's hinted loads and stores take.
template <int kBytes>
struct Bits;
template <>
struct Bits<2> {
  using type = unsigned short;
};
template <>
struct Bits<4> {
  using type = unsigned int;
};
template <>
struct Bits<8> {
  using type = uint2;
};
template <>
struct Bits<16> {
  using type = uint4;
};

// One access with the hint that the line is not needed again ("evict first").
template <typename P>
__device__ __forceinline__ P load_streaming(const P* address) {
  using B = typename Bits<sizeof(P)>::type;
  const B bits = __ldcs(reinterpret_cast<const B*>(address));
  P pack;
  memcpy(&pack, &bits, sizeof pack);
  return pack;
}

template <typename P>
__device__ __forceinline__ void store_streaming(P* address, const P& pack) {
  using B = typename Bits<sizeof(P)>::type;
  B bits;
  memcpy(&bits, &pack, sizeof bits);
  __stcs(reinterpret_cast<B*>(address), bits);
}

inline bool is_aligned(const void* address, size_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

__host__ __device__ constexpr DType code_of(float) { return DType::kFloat32; }
__host__ __device__ constexpr DType code_of(__nv_bfloat16) { return DType::kBFloat16; }
__host__ __device__ constexpr DType code_of(__half) { return DType::kFloat16; }

// Calls visit(T{}) with the storage type of a code.
template <typename Visit>
void with_type(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit(float{});
    case DType::kBFloat16:
      return visit(__nv_bfloat16{});
    case DType::kFloat16:
      return visit(__half{});
  }
}

}  // namespace fastdiff::cuda

// A square of values, as many registers as a register has lanes, with rows for columns.
#pragma once

#include "vector.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

#if defined(__clang__)
template <int... LANES>
struct Lanes {};
template <int N, int... LANES>
struct MakeLanes : MakeLanes<N - 1, N - 1, LANES...> {};
template <int... LANES>
struct MakeLanes<0, LANES...> {
  typedef Lanes<LANES...> type;
};
template <int HALF, int... L>
FASTDIFF_VEC Vec first_halves(Vec a, Vec b, Lanes<L...>) {
  return __builtin_shufflevector(a, b, ((L & HALF) ? L - HALF + kWidth : L)...);
}
template <int HALF, int... L>
FASTDIFF_VEC Vec second_halves(Vec a, Vec b, Lanes<L...>) {
  return __builtin_shufflevector(a, b, ((L & HALF) ? L + kWidth : L + HALF)...);
}
#endif

// Swaps the off-diagonal HALF×HALF blocks of every 2·HALF×2·HALF block.
template <int HALF>
FASTDIFF_VEC void transpose_blocks(Vec* rows) {
#if !defined(__clang__)
  VecI first, second;
  for (int lane = 0; lane < kWidth; ++lane) {
    first[lane] = (lane & HALF) ? lane - HALF + kWidth : lane;
    second[lane] = (lane & HALF) ? lane + kWidth : lane + HALF;
  }
#endif
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (i & HALF) continue;
    const Vec a = rows[i], b = rows[i + HALF];
#if defined(__clang__)
    rows[i] = first_halves<HALF>(a, b, typename MakeLanes<kWidth>::type{});
    rows[i + HALF] = second_halves<HALF>(a, b, typename MakeLanes<kWidth>::type{});
#else
    rows[i] = __builtin_shuffle(a, b, first);
    rows[i + HALF] = __builtin_shuffle(a, b, second);
#endif
  }
}

FASTDIFF_VEC void transpose(Vec* rows) {
  if constexpr (kWidth > 8) transpose_blocks<8>(rows);
  if constexpr (kWidth > 4) transpose_blocks<4>(rows);
  transpose_blocks<2>(rows);
  transpose_blocks<1>(rows);
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

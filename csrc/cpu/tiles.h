// AMX's tiles: whether this build has them, and whether the process may use them.
#pragma once

#include "vector.h"

// Where these kernels run there is AVX512_BF16 (isa.cpp), and AMX perhaps (may_use_tiles).
#if defined(__AVX512BF16__)
#define FASTDIFF_PAIRS
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define FASTDIFF_AMX

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastdiff::cpu::FASTDIFF_ISA {

#if defined(FASTDIFF_AMX)
// Linux saves the tiles of a process that has asked for it.
inline bool may_use_tiles() {
  static const bool asked = [] {
    constexpr int kRequest = 0x1023, kTileData = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool there = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16 and AMX-TILE
    return there && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return asked;
}

// Eight tiles with rows of 64 bytes: `rows` of them in the first `count` tiles, 16 in the others.
FASTDIFF_VEC void configure_tiles(int count, int64_t rows) {
  may_use_tiles();  // perhaps nobody has asked
  alignas(64) uint8_t config[64] = {1};
  for (int tile = 0; tile < 8; ++tile) {
    reinterpret_cast<uint16_t*>(config + 16)[tile] = 64;
    config[48 + tile] = static_cast<uint8_t>(tile < count ? rows : 16);
  }
  _tile_loadconfig(config);
}
#else
inline bool may_use_tiles() { return false; }
#endif

}  // namespace fastdiff::cpu::FASTDIFF_ISA

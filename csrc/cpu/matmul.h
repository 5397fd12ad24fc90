// Matrix products of float32 blocks, for kernels that hold both factors in scratch memory.
//
// The right factor is packed into panels: kPanel columns side by side, so that one step of the
// depth is kPanelVectors registers at one address; the last panel is as many registers wide as its
// columns need, filled up with zeros. The left factor is read where it stands, broadcast by
// broadcast. A tile of the result stays in registers for kDepth steps, over which a panel's rows
// stay in L1 (32 KiB with AVX-512).
//
// An element of the result is the same sum in the same order wherever it stands in a block, so that
// cutting the work differently (for another number of threads) changes no bit. The steps' sums are
// added to the result as one, which keeps a long sum's rounding error that of its pieces.
#pragma once

#include "threads.h"
#include "transpose.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

#if defined(__AVX512F__)
constexpr int kPanelVectors = 4;
constexpr int max_rows(int vectors) { return vectors == 4 ? 6 : 8; }  // 24 of 32 registers
#elif defined(__AVX2__)
constexpr int kPanelVectors = 2;
constexpr int max_rows(int) { return 6; }  // 12 of 16
#else
constexpr int kPanelVectors = 2;
constexpr int max_rows(int) { return 4; }  // 8 of 16: without FMA products take registers too
#endif
constexpr int64_t kPanel = kPanelVectors * kWidth;
constexpr int64_t kDepth = 64;

static inline int64_t padded(int64_t n) { return ceil_div(n, kWidth) * kWidth; }

// --- Packing ----------------------------------------------------------------------------------

// to[i·ld + j] = from[i·stride_i + j·stride_j] for i < rows and j < columns, in float32; zero for
// columns <= j < padded(columns).
template <typename T>
static void pack(float* to, int64_t ld, const T* from, int64_t stride_i, int64_t stride_j,
                 int64_t rows, int64_t columns) {
  if (stride_j == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      const T* row = from + i * stride_i;
      int64_t j = 0;
      for (; j + kWidth <= columns; j += kWidth) store(to + i * ld + j, load(row + j));
      if (j < columns) {
        store(to + i * ld + j, load_n(row + j, static_cast<int>(columns - j)));
      }
    }
    return;
  }
  for (int64_t j = 0; j < columns; j += kWidth) {
    const int across = static_cast<int>(smaller(kWidth, columns - j));
    for (int64_t i = 0; i < rows; i += kWidth) {
      const int down = static_cast<int>(smaller(kWidth, rows - i));
      const T* corner = from + i * stride_i + j * stride_j;
      Vec tile[kWidth];
      if (stride_i == 1 && across == kWidth && down == kWidth) {
        for (int jj = 0; jj < kWidth; ++jj) tile[jj] = load(corner + jj * stride_j);
        transpose(tile);
      } else {
        for (int ii = 0; ii < kWidth; ++ii) {
          tile[ii] = Vec{};
          if (ii >= down) continue;
          for (int jj = 0; jj < across; ++jj) {
            tile[ii][jj] = to_float(corner[ii * stride_i + jj * stride_j]);
          }
        }
      }
      for (int ii = 0; ii < down; ++ii) store(to + (i + ii) * ld + j, tile[ii]);
    }
  }
}

// The way back: to[i·stride_i + j·stride_j] = from[i·ld + j].
template <typename T>
static void unpack(T* to, int64_t stride_i, int64_t stride_j, const float* from, int64_t ld,
                   int64_t rows, int64_t columns) {
  if (stride_j == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      T* row = to + i * stride_i;
      int64_t j = 0;
      for (; j + kWidth <= columns; j += kWidth) store(row + j, load(from + i * ld + j));
      if (j < columns) store_n(row + j, load(from + i * ld + j), static_cast<int>(columns - j));
    }
    return;
  }
  for (int64_t j = 0; j < columns; j += kWidth) {
    const int across = static_cast<int>(smaller(kWidth, columns - j));
    for (int64_t i = 0; i < rows; i += kWidth) {
      const int down = static_cast<int>(smaller(kWidth, rows - i));
      T* corner = to + i * stride_i + j * stride_j;
      Vec tile[kWidth];
      for (int ii = 0; ii < kWidth; ++ii) {
        tile[ii] = ii < down ? load(from + (i + ii) * ld + j) : Vec{};
      }
      transpose(tile);
      for (int jj = 0; jj < across; ++jj) {
        T* column = corner + jj * stride_j;
        if (stride_i == 1 && down == kWidth) {
          store(column, tile[jj]);
        } else if (stride_i == 1) {
          store_n(column, tile[jj], down);
        } else {
          T elements[kWidth];
          store(elements, tile[jj]);
          for (int ii = 0; ii < down; ++ii) column[ii * stride_i] = elements[ii];
        }
      }
    }
  }
}

// Rows [k0, k1) and columns [c0, c1) of a (depth, columns) matrix into its panels; c0 is a multiple
// of kPanel.
template <typename T>
static void pack_panels(float* panels, int64_t depth, int64_t columns, const T* from,
                        int64_t stride_k, int64_t stride_c, int64_t k0, int64_t k1, int64_t c0,
                        int64_t c1) {
  for (int64_t c = c0; c < c1; c += kPanel) {
    const int64_t count = smaller(kPanel, columns - c);
    const int64_t width = padded(count);
    pack(panels + c * depth + k0 * width, width, from + k0 * stride_k + c * stride_c, stride_k,
         stride_c, k1 - k0, count);
  }
}

static inline int64_t panels_size(int64_t depth, int64_t columns) {
  return depth * padded(columns);
}

// --- The product ------------------------------------------------------------------------------

template <bool TRANSPOSED, bool FAR, int ROWS, int VECTORS>
static inline void multiply_tile(const float* a, int64_t lda, const float* b, float* c, int64_t ldc,
                                 int64_t depth, bool accumulate) {
  Vec sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      sums[i][j] = Vec{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      row[j] = load(b + j * kWidth);
      if (FAR) __builtin_prefetch(b + (kDepth * VECTORS + j) * kWidth);
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Vec factor = splat(TRANSPOSED ? a[i] : a[i * lda]);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sums[i][j] = fma(factor, row[j], sums[i][j]);
    }
    a += TRANSPOSED ? lda : 1;
    b += VECTORS * kWidth;
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      float* at = c + i * ldc + j * kWidth;
      store(at, accumulate ? load(at) + sums[i][j] : sums[i][j]);
    }
  }
}

template <bool TRANSPOSED, bool FAR, int VECTORS, int ROWS = max_rows(VECTORS)>
static void multiply_rows(const float* a, int64_t lda, const float* b, float* c, int64_t ldc,
                          int64_t rows, int64_t depth, bool accumulate) {
  for (; rows >= ROWS; rows -= ROWS) {
    multiply_tile<TRANSPOSED, FAR, ROWS, VECTORS>(a, lda, b, c, ldc, depth, accumulate);
    a += TRANSPOSED ? ROWS : ROWS * lda;
    c += ROWS * ldc;
  }
  if constexpr (ROWS > 1) {
    if (rows > 0) {
      multiply_rows<TRANSPOSED, FAR, VECTORS, ROWS - 1>(a, lda, b, c, ldc, rows, depth, accumulate);
    }
  }
}

template <bool TRANSPOSED, bool FAR, int VECTORS = kPanelVectors>
static void multiply_panel(int64_t vectors, const float* a, int64_t lda, const float* b, float* c,
                           int64_t ldc, int64_t rows, int64_t depth, bool accumulate) {
  if (vectors == VECTORS) {
    multiply_rows<TRANSPOSED, FAR, VECTORS>(a, lda, b, c, ldc, rows, depth, accumulate);
  } else if constexpr (VECTORS > 1) {
    multiply_panel<TRANSPOSED, FAR, VECTORS - 1>(vectors, a, lda, b, c, ldc, rows, depth,
                                                 accumulate);
  }
}

// c (rows, columns) = a·b, or c += a·b. a is (rows, depth), row by row; TRANSPOSED, column by
// column. b are rows [first, first + depth) of panels that are panel_depth deep. c's rows are ldc
// apart, which is at least padded(columns): whole registers are written. FAR panels lie behind the L2:
// the next kDepth rows are fetched while these are multiplied, across pages, at which the hardware's
// prefetching stops.
template <bool TRANSPOSED, bool FAR = false>
static void multiply(const float* a, int64_t lda, const float* panels, int64_t panel_depth,
                     int64_t first, float* c, int64_t ldc, int64_t rows, int64_t columns,
                     int64_t depth, bool accumulate) {
  for (int64_t column = 0; column < columns; column += kPanel) {
    const int64_t width = padded(smaller(kPanel, columns - column));
    const float* panel = panels + column * panel_depth + first * width;
    for (int64_t k = 0; k < depth; k += kDepth) {
      const float* left = a + (TRANSPOSED ? k * lda : k);
      multiply_panel<TRANSPOSED, FAR>(width / kWidth, left, lda, panel + k * width, c + column, ldc,
                                      rows, smaller(kDepth, depth - k), accumulate || k > 0);
    }
  }
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

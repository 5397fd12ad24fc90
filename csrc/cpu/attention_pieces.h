// attention on the CPU: how a call is cut into pieces, and how q, k and v are packed.
#pragma once

#include "../common/attention.h"
#include "matmul.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

constexpr int64_t kRows = 64;              // queries, or keys, of one block; fewer to occupy a team
constexpr int64_t kKeys = 256;             // whose scores stand in scratch memory at a time
constexpr int64_t kGroupFloats = 1 << 24;  // 64 MiB: bounds the heads that are packed at a time
constexpr int64_t kThreadWork = 1 << 18;   // products (5 µs) that justify another thread

// How one call is cut into pieces, and how long its scratch arrays are, in floats.
struct Cut {
  int team;
  int64_t rows;    // of a block
  int64_t blocks;  // of a head
  int64_t width;   // of a token's channels, in whole `columns`
  int64_t score_stride;
  int64_t group = 0;  // heads packed at a time
  int64_t head_floats = 0;
  int64_t thread_floats = 0;

  Cut(const Attention& p, int threads, int64_t columns) {
    const int64_t heads = p.samples * p.heads;
    const int64_t useful = 1 + heads * p.tokens * p.tokens * p.head_dim / kThreadWork;
    team = static_cast<int>(smaller(threads, useful));
    rows = kRows;
    while (rows > 16 && heads * ceil_div(p.tokens, rows) < 2 * team) rows /= 2;
    blocks = ceil_div(p.tokens, rows);
    width = ceil_div(p.head_dim, columns) * columns;
    // Not a power of two, or the rows of a column would share a few sets of the L1.
    score_stride = ceil_div(smaller(p.tokens, kKeys), columns) * columns + 16;
  }

  // Room for so many floats of each head and of each thread.
  void hold(const Attention& p, int64_t of_head, int64_t of_thread) {
    head_floats = ceil_div(of_head, 16) * 16;
    thread_floats = ceil_div(of_thread, 16) * 16;
    group = smaller(smaller(p.samples * p.heads, team), 1 + kGroupFloats / (head_floats + 1));
  }

  int64_t floats() const { return group * head_floats + team * thread_floats; }
};

// Calls work(head, piece) for the pieces of `heads` heads. With as many heads as threads each takes
// its own and waits for no other: a barrier costs a microsecond, and on a busy machine milliseconds.
template <typename Work>
FASTDIFF_VEC void for_each_piece(int64_t heads, int64_t pieces, const Work& work) {
  if (heads == thread_count()) {
    for (int64_t piece = 0; piece < pieces; ++piece) work(thread_index(), piece);
    return;
  }
#pragma omp for schedule(static)
  for (int64_t item = 0; item < heads * pieces; ++item) work(item / pieces, item % pieces);
}

// Calls work(base, group) for groups of heads. Before a group whose pieces are shared out, all are
// done with the scratch memory of the one before.
template <typename Work>
FASTDIFF_VEC void for_each_group(int64_t heads, int64_t most, const Work& work) {
  for (int64_t base = 0; base < heads; base += most) {
    const int64_t group = smaller(most, heads - base);
    if (base > 0 && group != thread_count()) {
#pragma omp barrier
    }
    work(base, group);
  }
}

// A head's q, k, v, or rows of the output.
template <typename T>
struct Part {
  T* data;
  int64_t channel_stride;
  int64_t token_stride;
};

template <typename T>
Part<T> part(const TokenTensor& tensor, int64_t sample, int64_t row) {
  return {
      static_cast<T*>(tensor.data) + sample * tensor.sample_stride + row * tensor.channel_stride,
      tensor.channel_stride, tensor.token_stride};
}

enum Factor { kQ, kK, kV };  // in the order of a projection's rows

// A head's q, k or v of a projection, or of its gradient.
template <typename T>
Part<T> factor_of(const Attention& p, const TokenTensor& projection, int64_t head, Factor which) {
  return part<T>(projection, head / p.heads, head % p.heads * p.head_rows + which * p.part_rows);
}

// `tokens` rows of head_dim channels, one after the other.
template <typename T>
void pack_rows(float* to, int64_t ld, const Part<T>& from, int64_t first, int64_t tokens,
               int64_t head_dim) {
  pack(to, ld, from.data + first * from.token_stride, from.token_stride, from.channel_stride,
       tokens, head_dim);
}

// Tokens by rows of float32 channels: where they stand, if that is what they are, or packed.
struct Rows {
  const float* data;
  int64_t stride;
};

template <typename T>
Rows rows_of(const Part<T>& from, int64_t first, int64_t tokens, int64_t head_dim, float* scratch,
             int64_t ld) {
  pack_rows(scratch, ld, from, first, tokens, head_dim);
  return {scratch, ld};
}

inline Rows rows_of(const Part<const float>& from, int64_t first, int64_t tokens, int64_t head_dim,
                    float* scratch, int64_t ld) {
  if (from.channel_stride == 1) return {from.data + first * from.token_stride, from.token_stride};
  pack_rows(scratch, ld, from, first, tokens, head_dim);
  return {scratch, ld};
}

template <typename T>
void unpack_rows(const Part<T>& to, int64_t first, const float* from, int64_t ld, int64_t tokens,
                 int64_t head_dim) {
  unpack(to.data + first * to.token_stride, to.token_stride, to.channel_stride, from, ld, tokens,
         head_dim);
}

// Tokens [first, last) of panels whose depth is the channels: the right factor of q·kᵀ.
template <typename T>
void pack_by_token(float* panels, const Part<T>& from, int64_t first, int64_t last, int64_t tokens,
                   int64_t head_dim) {
  pack_panels(panels, head_dim, tokens, from.data, from.channel_stride, from.token_stride, 0,
              head_dim, first, last);
}

// Tokens [first, last) of panels whose depth is the tokens: the right factor of P·v.
template <typename T>
void pack_by_channel(float* panels, const Part<T>& from, int64_t first, int64_t last,
                     int64_t tokens, int64_t head_dim) {
  pack_panels(panels, tokens, head_dim, from.data, from.token_stride, from.channel_stride, first,
              last, 0, head_dim);
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

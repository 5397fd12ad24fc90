// attention: softmax(scale·q·kᵀ)·v per head, scale = 1/sqrt(head_dim), forward and backward.
//
// Layouts: q, k and v are row ranges of one projection (N, 3C, T) with any strides; token-major
// (channel stride 1) and channel-major (token stride 1) are the ones in use. float32, bfloat16,
// float16; all arithmetic is float32. Any head_dim and number of tokens.
// Bytes moved: qkv once and the output once, and for backward qkv, output and its gradient once and
// the gradient of qkv once; that is little beside the floor, the matrix products: 4·T²·head_dim
// operations per head forward and 10·T²·head_dim backward. A head of 256 tokens and head_dim 256
// takes 0.34 ms at 32 FMAs a cycle and 3.1 GHz.
//
// Forward: k (transposed) and v of a head are packed into panels (matmul.h); each block of queries
// then goes over the keys in blocks of kKeys with an online softmax (Milakov & Gimelshein 2018;
// Dao et al. 2022, algorithm 1), and the logarithm of its denominator is kept: lse.
// Backward: P = exp(scale·q·kᵀ − lse) and dS = P∘(dO·vᵀ − rowsum(dO∘O))·scale of kKeys keys and
// all queries are written to the workspace; dV = Pᵀ·dO, dK = dSᵀ·q and dQ += dS·k follow from them
// (Dao et al. 2022, algorithm 4, in an order that adds up without atomics).
//
// Every thread takes a head; of the last ones, fewer than threads, they take blocks of queries or
// keys. No sum depends on how they share the work.
#include "attention.h"

#include "attention_pieces.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

// --- Forward ----------------------------------------------------------------------------------

// A row's maximum starts from the least number, not from -inf: scores may be -inf (their product
// overflows, or k has one), and of a first block of nothing else -inf − -inf would make NaN.
constexpr float kLeast = -__FLT_MAX__;

FASTDIFF_VEC Vec larger(Vec a, Vec b) { return a > b ? a : b; }

FASTDIFF_VEC Vec first_lanes(Vec v, int64_t n, float others) {
  VecI lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(n) ? v : splat(others);
}

// Lane i becomes the largest lane, or the sum of the lanes, of rows[i].
FASTDIFF_VEC Vec largest_of_each(Vec* rows) {
  transpose(rows);
  Vec result = rows[0];
  for (int i = 1; i < kWidth; ++i) result = larger(rows[i], result);
  return result;
}

FASTDIFF_VEC Vec sum_of_each(Vec* rows) {
  transpose(rows);
  Vec result = rows[0];
  for (int i = 1; i < kWidth; ++i) result += rows[i];
  return result;
}

// For up to kWidth rows: scores become exp(scale·scores - m), m the row's largest so far; its
// total so far is brought up to date. Returns what everything of the row so far shrank by.
inline Vec exponentials(float* scores, int64_t stride, int rows, int64_t keys, float scale,
                        float* m, float* total) {
  const float lowest = -__builtin_inff();
  const int64_t whole = keys - keys % kWidth;
  Vec each[kWidth];
  for (int i = 0; i < kWidth; ++i) each[i] = splat(lowest);
  for (int i = 0; i < rows; ++i) {
    const float* row = scores + i * stride;
    Vec highest = splat(lowest);
    for (int64_t j = 0; j < whole; j += kWidth) highest = larger(load(row + j), highest);
    if (whole < keys) {
      highest = larger(first_lanes(load(row + whole), keys - whole, lowest), highest);
    }
    each[i] = highest;
  }
  const Vec before = load(m), now = larger(largest_of_each(each) * splat(scale), before);
  store(m, now);

  const Vec factor = splat(scale);
  for (int i = 0; i < kWidth; ++i) each[i] = Vec{};
  for (int i = 0; i < rows; ++i) {
    float* row = scores + i * stride;
    const Vec offset = splat(-m[i]);
    Vec added = Vec{};
    for (int64_t j = 0; j < whole; j += kWidth) {
      const Vec p = exp(fma(load(row + j), factor, offset));
      store(row + j, p);
      added += p;
    }
    if (whole < keys) {
      const Vec p = exp(fma(load(row + whole), factor, offset));
      store(row + whole, p);
      added += first_lanes(p, keys - whole, 0.0f);
    }
    each[i] = added;
  }
  const Vec shrink = exp(before - now);
  store(total, fma(load(total), shrink, sum_of_each(each)));
  return shrink;
}

inline void multiply_row(float* row, int64_t width, float by) {
  const Vec factor = splat(by);
  for (int64_t j = 0; j < width; j += kWidth) store(row + j, load(row + j) * factor);
}

// One block of queries of one head.
template <typename T>
void attend(const Attention& p, const Cut& cut, int64_t head, int64_t block, const float* k_panels,
            const float* v_panels, float* scratch) {
  const int64_t tokens = p.tokens, head_dim = p.head_dim;
  const int64_t first = block * cut.rows, rows = smaller(cut.rows, tokens - first);
  const int64_t sample = head / p.heads, own = head % p.heads;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(head_dim));
  float* out = scratch + cut.rows * cut.width;
  float* scores = out + cut.rows * cut.width;
  const Rows q = rows_of(part<const T>(p.qkv, sample, own * p.head_rows), first, rows, head_dim,
                         scratch, cut.width);

  float m[kRows], total[kRows];
  for (int64_t i = 0; i < kRows; ++i) m[i] = kLeast, total[i] = 0.0f;
  for (int64_t key = 0; key < tokens; key += kKeys) {
    const int64_t keys = smaller(kKeys, tokens - key);
    multiply<false>(q.data, q.stride, k_panels + key * head_dim, head_dim, 0, scores,
                    cut.score_stride, rows, keys, head_dim, false);
    for (int64_t i = 0; i < rows; i += kWidth) {
      const int count = static_cast<int>(smaller(kWidth, rows - i));
      const Vec shrink = exponentials(scores + i * cut.score_stride, cut.score_stride, count, keys,
                                      scale, m + i, total + i);
      for (int row = 0; key > 0 && row < count; ++row) {
        multiply_row(out + (i + row) * cut.width, cut.width, shrink[row]);
      }
    }
    multiply<false>(scores, cut.score_stride, v_panels, tokens, key, out, cut.width, rows, head_dim,
                    keys, key > 0);
  }
  for (int64_t i = 0; i < rows; ++i) {
    // Of nothing but -inf there is no softmax; exp, which is never zero, would make one.
    if (m[i] == kLeast) total[i] = __builtin_nanf("");
    multiply_row(out + i * cut.width, cut.width, 1.0f / total[i]);
    if (p.lse != nullptr) p.lse[head * tokens + first + i] = m[i] + __builtin_logf(total[i]);
  }
  unpack_rows(part<T>(p.out, sample, own * head_dim), first, out, cut.width, rows, head_dim);
}

template <typename T>
void forward(const Attention& p, int threads) {
  const Cut cut(p, threads, false);
  const int64_t heads = p.samples * p.heads, tokens = p.tokens, head_dim = p.head_dim;
  const int64_t chunks = ceil_div(tokens, kRows);
  float* scratch = p.workspace + cut.group * cut.head_floats;
#pragma omp parallel num_threads(cut.team) if (cut.team > 1)
  for_each_group(heads, cut.group, [&](int64_t base, int64_t group) {
    for_each_piece(group, chunks, [&](int64_t index, int64_t chunk) {
      const int64_t sample = (base + index) / p.heads, own = (base + index) % p.heads;
      const int64_t first = chunk * kRows, last = smaller(first + kRows, tokens);
      float* k_panels = p.workspace + index * cut.head_floats;
      float* v_panels = k_panels + panels_size(head_dim, tokens);
      const int64_t row = own * p.head_rows;
      pack_by_token(k_panels, part<const T>(p.qkv, sample, row + p.part_rows), first, last, tokens,
                    head_dim);
      pack_by_channel(v_panels, part<const T>(p.qkv, sample, row + 2 * p.part_rows), first, last,
                      tokens, head_dim);
    });
    for_each_piece(group, cut.blocks, [&](int64_t index, int64_t block) {
      const float* k_panels = p.workspace + index * cut.head_floats;
      attend<T>(p, cut, base + index, block, k_panels, k_panels + panels_size(head_dim, tokens),
                scratch + thread_index() * cut.thread_floats);
    });
  });
}

// --- Backward ---------------------------------------------------------------------------------

// A head's share of the workspace.
struct HeadScratch {
  float* k_by_token;
  float* v_by_token;
  float* q_by_channel;
  float* k_by_channel;
  float* grad_out_by_channel;
  float* grad_q;         // (tokens, width): a sum over the blocks of keys
  float* probabilities;  // (tokens, score_stride), of one block of keys
  float* grad_scores;
  float* dots;  // rowsum(dO∘O)

  HeadScratch(float* from, const Attention& p, const Cut& cut) {
    const int64_t by_channel = p.tokens * cut.width, by_token = p.head_dim * padded(p.tokens);
    k_by_token = from;
    v_by_token = k_by_token + by_token;
    q_by_channel = v_by_token + by_token;
    k_by_channel = q_by_channel + by_channel;
    grad_out_by_channel = k_by_channel + by_channel;
    grad_q = grad_out_by_channel + by_channel;
    probabilities = grad_q + by_channel;
    grad_scores = probabilities + p.tokens * cut.score_stride;
    dots = grad_scores + p.tokens * cut.score_stride;
  }
};

// What the pieces of one head's backward have in common.
template <typename T>
struct Backward {
  const Attention& p;
  const Cut& cut;
  HeadScratch scratch;
  int64_t head;
  Part<const T> q, k, v, out, grad_out;
  Part<T> grad_q, grad_k, grad_v;

  Backward(const Attention& p, const Cut& cut, int64_t base, int64_t index)
      : p(p), cut(cut), scratch(p.workspace + index * cut.head_floats, p, cut), head(base + index) {
    const int64_t sample = head / p.heads, own = head % p.heads, row = own * p.head_rows;
    q = part<const T>(p.qkv, sample, row);
    k = part<const T>(p.qkv, sample, row + p.part_rows);
    v = part<const T>(p.qkv, sample, row + 2 * p.part_rows);
    out = part<const T>(p.out, sample, own * p.head_dim);
    grad_out = part<const T>(p.grad_out, sample, own * p.head_dim);
    grad_q = part<T>(p.grad_qkv, sample, row);
    grad_k = part<T>(p.grad_qkv, sample, row + p.part_rows);
    grad_v = part<T>(p.grad_qkv, sample, row + 2 * p.part_rows);
  }

  void pack_chunk(int64_t chunk) const {
    const int64_t first = chunk * kRows, last = smaller(first + kRows, p.tokens);
    pack_by_token(scratch.k_by_token, k, first, last, p.tokens, p.head_dim);
    pack_by_token(scratch.v_by_token, v, first, last, p.tokens, p.head_dim);
    pack_by_channel(scratch.q_by_channel, q, first, last, p.tokens, p.head_dim);
    pack_by_channel(scratch.k_by_channel, k, first, last, p.tokens, p.head_dim);
    pack_by_channel(scratch.grad_out_by_channel, grad_out, first, last, p.tokens, p.head_dim);
  }

  // P and dS of one block of queries and the keys [key, key + keys).
  void scores(int64_t block, int64_t key, int64_t keys, float* rows_scratch) const {
    const int64_t first = block * cut.rows, rows = smaller(cut.rows, p.tokens - first);
    const int64_t head_dim = p.head_dim, stride = cut.score_stride;
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(head_dim));
    float* left = rows_scratch;
    float* other = left + cut.rows * cut.width;
    float* probabilities = scratch.probabilities + first * stride;
    float* grad_scores = scratch.grad_scores + first * stride;

    const Rows queries = rows_of(q, first, rows, head_dim, left, cut.width);
    multiply<false>(queries.data, queries.stride, scratch.k_by_token + key * head_dim, head_dim, 0,
                    probabilities, stride, rows, keys, head_dim, false);
    const Rows gradients = rows_of(grad_out, first, rows, head_dim, left, cut.width);
    multiply<false>(gradients.data, gradients.stride, scratch.v_by_token + key * head_dim, head_dim,
                    0, grad_scores, stride, rows, keys, head_dim, false);
    if (key == 0) {
      const Rows outputs = rows_of(out, first, rows, head_dim, other, cut.width);
      for (int64_t i = 0; i < rows; ++i) {
        const float* a = gradients.data + i * gradients.stride;
        const float* b = outputs.data + i * outputs.stride;
        const int64_t whole = head_dim - head_dim % kWidth;
        Vec dot = Vec{};
        for (int64_t j = 0; j < whole; j += kWidth) dot = fma(load(a + j), load(b + j), dot);
        if (whole < head_dim) {
          const int rest = static_cast<int>(head_dim - whole);
          dot = fma(load_n(a + whole, rest), load_n(b + whole, rest), dot);
        }
        scratch.dots[first + i] = sum(dot);
      }
    }
    const Vec factor = splat(scale);
    for (int64_t i = 0; i < rows; ++i) {
      const Vec lse = splat(p.lse[head * p.tokens + first + i]);
      const Vec dot = splat(scratch.dots[first + i]);
      for (int64_t j = 0; j < keys; j += kWidth) {
        float* at = probabilities + i * stride + j;
        const Vec probability = exp(fma(load(at), factor, -lse));
        store(at, probability);
        at = grad_scores + i * stride + j;
        store(at, probability * (load(at) - dot) * factor);
      }
    }
  }

  // dV (with P, dO) or dK (with dS, q) of `rows` keys from `first` on, which is `offset` within the
  // block of keys whose scores are at hand.
  void key_gradient(const Part<T>& to, const float* scores, const float* panels, int64_t first,
                    int64_t offset, int64_t rows, float* result) const {
    multiply<true>(scores + offset, cut.score_stride, panels, p.tokens, 0, result, cut.width, rows,
                   p.head_dim, p.tokens, false);
    unpack_rows(to, first, result, cut.width, rows, p.head_dim);
  }

  void query_gradient(int64_t block, int64_t key, int64_t keys) const {
    const int64_t first = block * cut.rows, rows = smaller(cut.rows, p.tokens - first);
    float* sums = scratch.grad_q + first * cut.width;
    multiply<false>(scratch.grad_scores + first * cut.score_stride, cut.score_stride,
                    scratch.k_by_channel, p.tokens, key, sums, cut.width, rows, p.head_dim, keys,
                    key > 0);
    if (key + keys == p.tokens) unpack_rows(grad_q, first, sums, cut.width, rows, p.head_dim);
  }
};

template <typename T>
void backward(const Attention& p, int threads) {
  const Cut cut(p, threads, true);
  const int64_t heads = p.samples * p.heads, tokens = p.tokens;
  const int64_t chunks = ceil_div(tokens, kRows);
  float* scratch = p.workspace + cut.group * cut.head_floats;
#pragma omp parallel num_threads(cut.team) if (cut.team > 1)
  for_each_group(heads, cut.group, [&](int64_t base, int64_t group) {
    float* own_scratch = scratch + thread_index() * cut.thread_floats;
    for_each_piece(group, chunks, [&](int64_t index, int64_t chunk) {
      Backward<T>(p, cut, base, index).pack_chunk(chunk);
    });
    for (int64_t key = 0; key < tokens; key += kKeys) {
      const int64_t keys = smaller(kKeys, tokens - key);
      for_each_piece(group, cut.blocks, [&](int64_t index, int64_t block) {
        Backward<T>(p, cut, base, index).scores(block, key, keys, own_scratch);
      });
      const int64_t key_blocks = ceil_div(keys, cut.rows);
      for_each_piece(group, cut.blocks + 2 * key_blocks, [&](int64_t index, int64_t piece) {
        const Backward<T> own(p, cut, base, index);
        if (piece < cut.blocks) return own.query_gradient(piece, key, keys);
        const int64_t offset = (piece - cut.blocks) / 2 * cut.rows;
        const int64_t rows = smaller(cut.rows, keys - offset);
        if ((piece - cut.blocks) % 2 == 0) {
          own.key_gradient(own.grad_v, own.scratch.probabilities, own.scratch.grad_out_by_channel,
                           key + offset, offset, rows, own_scratch);
        } else {
          own.key_gradient(own.grad_k, own.scratch.grad_scores, own.scratch.q_by_channel,
                           key + offset, offset, rows, own_scratch);
        }
      });
    }
  });
}

}  // namespace

int64_t attention_workspace(const Attention& p, bool for_backward, int threads) {
  const Cut cut(p, threads, for_backward);
  return cut.group * cut.head_floats + cut.team * cut.thread_floats;
}

void attention_forward(const Attention& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat32:
      return forward<float>(p, threads);
    case DType::kBFloat16:
      return forward<BFloat16>(p, threads);
    case DType::kFloat16:
      return forward<Float16>(p, threads);
  }
}

void attention_backward(const Attention& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat32:
      return backward<float>(p, threads);
    case DType::kBFloat16:
      return backward<BFloat16>(p, threads);
    case DType::kFloat16:
      return backward<Float16>(p, threads);
  }
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA

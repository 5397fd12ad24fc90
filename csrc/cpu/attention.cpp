// attention: softmax(scale·q·kᵀ)·v per head, scale = 1/sqrt(head_dim), forward and backward.
//
// Layouts: q, k and v are row ranges of one projection (N, 3C, T) with any strides; token-major
// (channel stride 1) and channel-major (token stride 1) are the ones in use. float32, bfloat16,
// float16; all sums and the softmax are float32, products as `products` says. Any head_dim and number
// of tokens.
// Bytes moved: qkv once and the output once, and for backward qkv, output and its gradient once and
// the gradient of qkv once; that is little beside the floor, the matrix products: 4·T²·head_dim
// operations per head forward and 10·T²·head_dim backward. A head of 256 tokens and head_dim 256
// takes 0.34 ms at 32 FMAs a cycle and 3.1 GHz.
//
// Forward: attention_forward.h, with float32 products or in tiles (attention_tiles.h).
// Backward: P = exp(scale·q·kᵀ − lse) and dS = P∘(dO·vᵀ − rowsum(dO∘O))·scale of kKeys keys and
// all queries are written to the workspace; dV = Pᵀ·dO, dK = dSᵀ·q and dQ += dS·k follow from them
// (Dao et al. 2022, algorithm 4, in an order that adds up without atomics).
//
// Every thread takes a head; of the last ones, fewer than threads, they take blocks of queries or
// keys. No sum depends on how they share the work.
#include "attention.h"

#include "attention_forward.h"
#include "attention_tiles.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

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
    const int64_t sample = head / p.heads, own = head % p.heads;
    q = factor_of<const T>(p, p.qkv, head, kQ);
    k = factor_of<const T>(p, p.qkv, head, kK);
    v = factor_of<const T>(p, p.qkv, head, kV);
    out = part<const T>(p.out, sample, own * p.head_dim);
    grad_out = part<const T>(p.grad_out, sample, own * p.head_dim);
    grad_q = factor_of<T>(p, p.grad_qkv, head, kQ);
    grad_k = factor_of<T>(p, p.grad_qkv, head, kK);
    grad_v = factor_of<T>(p, p.grad_qkv, head, kV);
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

Cut backward_cut(const Attention& p, int threads) {
  Cut cut(p, threads, kWidth);
  const int64_t by_channel = p.tokens * cut.width, by_token = p.head_dim * padded(p.tokens);
  cut.hold(p, 4 * by_channel + 2 * by_token + padded(p.tokens) + 2 * p.tokens * cut.score_stride,
           2 * cut.rows * cut.width);
  return cut;
}

template <typename T>
void backward(const Attention& p, int threads) {
  const Cut cut = backward_cut(p, threads);
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

template <typename T>
struct Kind {
  using Factors = T;
};

// each(Kind<Factors>), for the Factors that make a call's products.
template <typename Each>
auto with_factors(const Attention& p, const Each& each) {
#if defined(FASTDIFF_AMX)
  if (p.products == Products::kBFloat16) return each(Kind<TileFactors<BFloat16, false>>{});
  if (p.products == Products::kSplit && p.dtype == DType::kFloat16) {
    return each(Kind<TileFactors<Float16, true>>{});
  }
  if (p.products == Products::kSplit) return each(Kind<TileFactors<float, true>>{});
#endif
  if (p.dtype == DType::kBFloat16) return each(Kind<PanelFactors<BFloat16>>{});
  if (p.dtype == DType::kFloat16) return each(Kind<PanelFactors<Float16>>{});
  return each(Kind<PanelFactors<float>>{});
}

}  // namespace

int64_t attention_workspace(const Attention& p, bool for_backward, int threads) {
  if (for_backward) return backward_cut(p, threads).floats();
  return with_factors(p, [&](auto made) {
    return forward_cut<typename decltype(made)::Factors>(p, threads).floats();
  });
}

void attention_forward(const Attention& p, int threads) {
  with_factors(p, [&](auto made) { forward<typename decltype(made)::Factors>(p, threads); });
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

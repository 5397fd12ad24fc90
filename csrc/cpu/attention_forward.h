// attention forward: a block of queries goes over the keys in blocks of kKeys with an online softmax
// (Milakov & Gimelshein 2018; Dao et al. 2022, algorithm 1), and the logarithm of its denominator is
// kept: lse. What multiplies is Factors', which hold k and v of a head in the order that they read.
#pragma once

#include "attention_pieces.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

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
// total so far is brought up to date. put(row, key, exponentials) takes them. Returns what everything
// of the row so far shrank by.
template <typename Put>
Vec exponentials(const float* scores, int64_t stride, int rows, int64_t keys, float scale, float* m,
                 float* total, const Put& put) {
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
    const float* row = scores + i * stride;
    const Vec offset = splat(-m[i]);
    Vec added = Vec{};
    for (int64_t j = 0; j < whole; j += kWidth) {
      const Vec p = exp(fma(load(row + j), factor, offset));
      put(i, j, p);
      added += p;
    }
    if (whole < keys) {
      const Vec p = exp(fma(load(row + whole), factor, offset));
      const Vec there = first_lanes(p, keys - whole, 0.0f);
      put(i, whole, there);
      added += there;
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

// One block of queries of one head, of which `packed` holds k and v.
template <typename Factors>
void attend(const Attention& p, const Cut& cut, int64_t head, int64_t block, const float* packed,
            float* scratch) {
  using T = typename Factors::Element;
  const int64_t tokens = p.tokens, head_dim = p.head_dim;
  const int64_t first = block * cut.rows, rows = smaller(cut.rows, tokens - first);
  const int64_t sample = head / p.heads, own = head % p.heads;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(head_dim));
  float* out = scratch;
  float* scores = out + cut.rows * cut.width;
  Factors factors(p, cut, packed, scores, scores + cut.rows * cut.score_stride);
  factors.take_queries(factor_of<const T>(p, p.qkv, head, kQ), first, rows);

  float m[kRows], total[kRows];
  for (int64_t i = 0; i < kRows; ++i) m[i] = kLeast, total[i] = 0.0f;
  for (int64_t key = 0; key < tokens; key += kKeys) {
    const int64_t keys = smaller(kKeys, tokens - key);
    factors.score(key, keys);
    for (int64_t i = 0; i < rows; i += kWidth) {
      const int count = static_cast<int>(smaller(kWidth, rows - i));
      const auto put = [&](int row, int64_t j, Vec v) { factors.put(i + row, j, v); };
      const Vec shrink = exponentials(scores + i * cut.score_stride, cut.score_stride, count, keys,
                                      scale, m + i, total + i, put);
      for (int row = 0; key > 0 && row < count; ++row) {
        multiply_row(out + (i + row) * cut.width, cut.width, shrink[row]);
      }
    }
    factors.add_values(key, keys, out);
  }
  for (int64_t i = 0; i < rows; ++i) {
    // Of nothing but -inf there is no softmax; exp, which is never zero, would make one.
    if (m[i] == kLeast) total[i] = __builtin_nanf("");
    multiply_row(out + i * cut.width, cut.width, 1.0f / total[i]);
    if (p.lse != nullptr) p.lse[head * tokens + first + i] = m[i] + __builtin_logf(total[i]);
  }
  unpack_rows(part<T>(p.out, sample, own * head_dim), first, out, cut.width, rows, head_dim);
}

template <typename Factors>
Cut forward_cut(const Attention& p, int threads) {
  Cut cut(p, threads, Factors::kColumns);
  cut.hold(p, Factors::head_floats(p, cut),
           cut.rows * (cut.width + cut.score_stride) + Factors::block_floats(p, cut));
  return cut;
}

template <typename Factors>
void forward(const Attention& p, int threads) {
  const Cut cut = forward_cut<Factors>(p, threads);
  const int64_t heads = p.samples * p.heads, chunks = ceil_div(p.tokens, kRows);
  float* scratch = p.workspace + cut.group * cut.head_floats;
#pragma omp parallel num_threads(cut.team) if (cut.team > 1)
  for_each_group(heads, cut.group, [&](int64_t base, int64_t group) {
    for_each_piece(group, chunks, [&](int64_t index, int64_t chunk) {
      const int64_t first = chunk * kRows, last = smaller(first + kRows, p.tokens);
      Factors::pack(p, cut, base + index, first, last, p.workspace + index * cut.head_floats);
    });
    for_each_piece(group, cut.blocks, [&](int64_t index, int64_t block) {
      attend<Factors>(p, cut, base + index, block, p.workspace + index * cut.head_floats,
                      scratch + thread_index() * cut.thread_floats);
    });
  });
}

// Float32: k (transposed) and v in panels (matmul.h).
template <typename T>
class PanelFactors {
 public:
  using Element = T;
  static constexpr int64_t kColumns = kWidth;

  static int64_t head_floats(const Attention& p, const Cut& cut) {
    return p.head_dim * padded(p.tokens) + p.tokens * cut.width;
  }
  static int64_t block_floats(const Attention&, const Cut& cut) { return cut.rows * cut.width; }

  // Tokens [first, last) of a head's k and v.
  static void pack(const Attention& p, const Cut&, int64_t head, int64_t first, int64_t last,
                   float* to) {
    pack_by_token(to, factor_of<const T>(p, p.qkv, head, kK), first, last, p.tokens, p.head_dim);
    pack_by_channel(to + panels_size(p.head_dim, p.tokens), factor_of<const T>(p, p.qkv, head, kV), first, last, p.tokens,
                    p.head_dim);
  }

  PanelFactors(const Attention& p, const Cut& cut, const float* packed, float* scores,
               float* scratch)
      : p_(p),
        cut_(cut),
        k_(packed),
        v_(packed + panels_size(p.head_dim, p.tokens)),
        scores_(scores),
        scratch_(scratch) {}

  FASTDIFF_MEMBER void take_queries(const Part<const T>& q, int64_t first, int64_t rows) {
    q_ = rows_of(q, first, rows, p_.head_dim, scratch_, cut_.width);
    rows_ = rows;
  }
  // q·kᵀ of the keys [key, key + keys).
  FASTDIFF_MEMBER void score(int64_t key, int64_t keys) const {
    multiply<false>(q_.data, q_.stride, k_ + key * p_.head_dim, p_.head_dim, 0, scores_,
                    cut_.score_stride, rows_, keys, p_.head_dim, false);
  }
  FASTDIFF_MEMBER void put(int64_t row, int64_t key, Vec probabilities) const {
    store(scores_ + row * cut_.score_stride + key, probabilities);
  }
  // out = P·v of these keys, or with earlier ones out += P·v.
  FASTDIFF_MEMBER void add_values(int64_t key, int64_t keys, float* out) const {
    multiply<false>(scores_, cut_.score_stride, v_, p_.tokens, key, out, cut_.width, rows_,
                    p_.head_dim, keys, key > 0);
  }

 private:
  const Attention& p_;
  const Cut& cut_;
  const float *k_, *v_;
  float *scores_, *scratch_;
  Rows q_{};
  int64_t rows_ = 0;
};

}  // namespace fastdiff::cpu::FASTDIFF_ISA

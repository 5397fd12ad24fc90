// The sizes and addresses of one call of attention (csrc/cpu/attention.cpp).
#pragma once

#include <cstdint>

#include "convolution.h"
#include "dtype.h"

namespace fastdiff {

// A (samples, channels, tokens) tensor; the strides count elements.
struct TokenTensor {
  void* data;
  int64_t sample_stride;
  int64_t channel_stride;
  int64_t token_stride;
};

struct Attention {
  DType dtype;
  Products products;  // kFloat32, kBFloat16 of bfloat16, or kSplit, of forward
  int64_t samples;
  int64_t heads;
  int64_t tokens;
  int64_t head_dim;
  int64_t head_rows;  // of qkv, from one head's q to the next one's
  int64_t part_rows;  // from a head's q to its k, and on to its v
  TokenTensor qkv;
  TokenTensor out;
  TokenTensor grad_out;  // these two for backward alone
  TokenTensor grad_qkv;
  float* lse;        // (samples, heads, tokens), or null: forward writes it, backward reads it
  float* workspace;  // attention_workspace() floats, 64-byte aligned
};

}  // namespace fastdiff

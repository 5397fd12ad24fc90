"""attention: softmax(q·kᵀ/√d)·v on the packed qkv projection, forward and backward, in Triton.

Layouts: qkv (N, 3C, T) with any strides, rows heads_first [h0q, h0k, h0v, h1q, …] or qkv_first
[Q | K | V]; out (N, C, T) with any strides; float32, bfloat16, float16. Softmax is float32.
Bytes moved: q once, k and v once per block of queries (from the L2 but for the first), out once.
Floor for (8, 6 heads, 1024 tokens, 64) bfloat16, forward: 16 µs at 790 TFLOP/s (H200).

Flash attention (Dao et al. 2022): a program holds a block of queries, walks over the keys with a
running maximum and sum, and rescales what it has summed. The backward recomputes the
probabilities (attention_backward). Heads of any width, in chunks (attention_tiles); any token
count. Deterministic: no atomics.
"""

import torch
import triton
import triton.language as tl

from .attention_backward import backward
from .attention_tiles import (
    LEAST,
    LN_2,
    LOG2_E,
    append,
    choose_tiles,
    constants,
    head_rows,
    indices,
    load_tile,
    prepare,
    products,
    split_program,
    store_tile,
    zeros,
)
from .launcher import Launch

Tensor = torch.Tensor
__all__ = ["backward", "forward", "choose_tiles"]


@triton.jit
def forward_kernel(
    qkv,
    out,
    lse,  # (N, H, T) or None
    scale,
    blocks,
    heads,
    tokens,
    strides,  # of qkv: sample, channel, token
    out_strides,
    D: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BD: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HOLD: tl.constexpr,  # keep the queries; float32 has no room to
):
    OWNED: tl.constexpr = (CHUNKS + SPLITS - 1) // SPLITS
    block, split, head, sample = split_program(blocks, heads, SPLITS)
    q_base, k_base, v_base = head_rows(qkv, sample, head, heads, strides, D, HEADS_FIRST)
    m = indices(block * BM, BM, WIDE)
    q = ()
    if HOLD:
        for c in tl.static_range(CHUNKS):
            d = indices(c * BD, BD, WIDE)
            q = append(q, load_tile(q_base, m, d, strides[2], strides[1], tokens, D))

    # The least number, not -inf: of a block of scores that overflowed, -inf − -inf would be NaN.
    top = tl.full((BM,), LEAST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = zeros(BM, BD, OWNED)
    for start in range(0, tokens, BN):
        n = indices(start, BN, WIDE)
        if HOLD:
            s = tl.zeros((BM, BN), tl.float32)
            for c in tl.static_range(CHUNKS):
                d = indices(c * BD, BD, WIDE)
                k = load_tile(k_base, d, n, strides[1], strides[2], D, tokens)
                s = tl.dot(q[c], k, s, input_precision=PRECISION)
        else:
            s = products(
                q_base, strides, k_base, strides, m, n, tokens,
                D, BD, CHUNKS, BM, BN, WIDE, PRECISION,
            )  # fmt: skip
        s = tl.where((n < tokens)[None, :], s * (scale * LOG2_E), float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(p, 1)
        top = new_top
        summed = ()
        for i in tl.static_range(OWNED):
            d = indices((split * OWNED + i) * BD, BD, WIDE)
            v = load_tile(v_base, n, d, strides[2], strides[1], tokens, D)
            summed = append(
                summed,
                tl.dot(p.to(v.dtype), v, acc[i] * fade[:, None], input_precision=PRECISION),
            )
        acc = summed

    base = out + sample * out_strides[0] + head.to(tl.int64) * D * out_strides[1]
    for i in tl.static_range(OWNED):
        d = indices((split * OWNED + i) * BD, BD, WIDE)
        value = acc[i] / total[:, None]
        store_tile(base, value, m, d, out_strides[2], out_strides[1], tokens, D)
    if lse is not None:
        if split == 0:
            row = (sample * heads + head) * tokens + m
            tl.store(lse + row, (top + tl.log2(total)) * LN_2, mask=m < tokens)


def forward(qkv: Tensor, num_heads: int, order: str, out: Tensor) -> Launch:
    """The launch for a qkv (N, 3C, T) and an out (N, C, T) like these. It takes qkv, and fills out
    and, for a backward to come, lse = log Σ exp(scores), float32 (N, H, T), unless that is None."""
    tokens, head_dim, tiles = prepare(qkv, num_heads)
    blocks = triton.cdiv(tokens, tiles.forward.rows)
    grid = (blocks * tiles.forward.splits * num_heads * qkv.shape[0],)
    return Launch(
        forward_kernel, grid,
        head_dim**-0.5, blocks, int(num_heads), tokens, qkv.stride(), out.stride(),
        HOLD=qkv.element_size() == 2,
        **constants(head_dim, order, qkv.dtype, tiles.forward, qkv, out),
    )  # fmt: skip

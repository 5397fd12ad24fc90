"""The backward of attention: probabilities are recomputed from lse = log Σ exp of the scores.

    dv = pᵀ·g,  dq = scale·ds·k,  dk = scale·dsᵀ·q,  ds = p·(g·vᵀ − delta),  delta = Σ_d out·g

One kernel owns blocks of keys (dk, dv), one blocks of queries (dq), so no sum is shared between
programs and two runs are bit-equal. Layouts and range: see attention.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from .attention_tiles import (
    LOG2_E,
    Tiles,
    append,
    constants,
    head_rows,
    indices,
    load_tile,
    prepare,
    products,
    split_program,
    store_tile,
    wide,
    zeros,
)
from .launcher import Launch

Tensor = torch.Tensor


@triton.jit
def delta_kernel(
    out,
    grad_out,
    delta,  # (N, H, T): Σ_d out·grad_out
    blocks,
    heads,
    tokens,
    out_strides,
    grad_strides,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    BD: tl.constexpr,
    CHUNKS: tl.constexpr,
    BM: tl.constexpr,
):
    block, _, head, sample = split_program(blocks, heads, 1)
    m = indices(block * BM, BM, WIDE)
    out += sample * out_strides[0] + head.to(tl.int64) * D * out_strides[1]
    grad_out += sample * grad_strides[0] + head.to(tl.int64) * D * grad_strides[1]
    total = tl.zeros((BM,), tl.float32)
    for c in tl.static_range(CHUNKS):
        d = indices(c * BD, BD, WIDE)
        o = load_tile(out, m, d, out_strides[2], out_strides[1], tokens, D).to(tl.float32)
        g = load_tile(grad_out, m, d, grad_strides[2], grad_strides[1], tokens, D)
        total += tl.sum(o * g.to(tl.float32), 1)
    tl.store(delta + (sample * heads + head) * tokens + m, total, mask=m < tokens)


@triton.jit
def keys_kernel(
    qkv,
    grad_out,
    lse,
    delta,
    grad_qkv,
    scale,
    blocks,
    heads,
    tokens,
    strides,
    grad_strides,  # of grad_out
    grad_qkv_strides,
    D: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BD: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,  # keys of this program
    BN: tl.constexpr,  # queries at a time
):
    """dv = pᵀ·g and dk = scale·dsᵀ·q, ds = p·(g·vᵀ − delta); everything held transposed."""
    OWNED: tl.constexpr = (CHUNKS + SPLITS - 1) // SPLITS
    block, split, head, sample = split_program(blocks, heads, SPLITS)
    q_base, k_base, v_base = head_rows(qkv, sample, head, heads, strides, D, HEADS_FIRST)
    g_base = grad_out + sample * grad_strides[0] + head.to(tl.int64) * D * grad_strides[1]
    per_row = (sample * heads + head) * tokens
    keys = indices(block * BM, BM, WIDE)
    dk = zeros(BM, BD, OWNED)
    dv = zeros(BM, BD, OWNED)
    for start in range(0, tokens, BN):
        n = indices(start, BN, WIDE)
        s = products(
            k_base, strides, q_base, strides, keys, n, tokens,
            D, BD, CHUNKS, BM, BN, WIDE, PRECISION,
        )  # fmt: skip
        dp = products(
            v_base, strides, g_base, grad_strides, keys, n, tokens,
            D, BD, CHUNKS, BM, BN, WIDE, PRECISION,
        )  # fmt: skip
        row_lse = tl.load(lse + per_row + n, mask=n < tokens, other=float("inf"))
        row_delta = tl.load(delta + per_row + n, mask=n < tokens, other=0.0)
        p = tl.exp2(s * (scale * LOG2_E) - (row_lse * LOG2_E)[None, :])  # 0 past the tokens
        ds = p * (dp - row_delta[None, :])
        new_dk = ()
        new_dv = ()
        for i in tl.static_range(OWNED):
            d = indices((split * OWNED + i) * BD, BD, WIDE)
            g = load_tile(g_base, n, d, grad_strides[2], grad_strides[1], tokens, D)
            new_dv = append(new_dv, tl.dot(p.to(g.dtype), g, dv[i], input_precision=PRECISION))
            q = load_tile(q_base, n, d, strides[2], strides[1], tokens, D)
            new_dk = append(new_dk, tl.dot(ds.to(q.dtype), q, dk[i], input_precision=PRECISION))
        dk = new_dk
        dv = new_dv

    _, dk_base, dv_base = head_rows(grad_qkv, sample, head, heads, grad_qkv_strides, D, HEADS_FIRST)
    for i in tl.static_range(OWNED):
        d = indices((split * OWNED + i) * BD, BD, WIDE)
        to = (grad_qkv_strides[2], grad_qkv_strides[1])
        store_tile(dk_base, dk[i] * scale, keys, d, to[0], to[1], tokens, D)
        store_tile(dv_base, dv[i], keys, d, to[0], to[1], tokens, D)


@triton.jit
def queries_kernel(
    qkv,
    grad_out,
    lse,
    delta,
    grad_qkv,
    scale,
    blocks,
    heads,
    tokens,
    strides,
    grad_strides,
    grad_qkv_strides,
    D: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BD: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dq = scale·ds·k."""
    OWNED: tl.constexpr = (CHUNKS + SPLITS - 1) // SPLITS
    block, split, head, sample = split_program(blocks, heads, SPLITS)
    q_base, k_base, v_base = head_rows(qkv, sample, head, heads, strides, D, HEADS_FIRST)
    g_base = grad_out + sample * grad_strides[0] + head.to(tl.int64) * D * grad_strides[1]
    m = indices(block * BM, BM, WIDE)
    per_row = (sample * heads + head) * tokens
    row_lse = tl.load(lse + per_row + m, mask=m < tokens, other=0.0)
    row_delta = tl.load(delta + per_row + m, mask=m < tokens, other=0.0)
    dq = zeros(BM, BD, OWNED)
    for start in range(0, tokens, BN):
        n = indices(start, BN, WIDE)
        s = products(
            q_base, strides, k_base, strides, m, n, tokens,
            D, BD, CHUNKS, BM, BN, WIDE, PRECISION,
        )  # fmt: skip
        dp = products(
            g_base, grad_strides, v_base, strides, m, n, tokens,
            D, BD, CHUNKS, BM, BN, WIDE, PRECISION,
        )  # fmt: skip
        # Past the tokens s and k are zero, but exp(0 - lse) may overflow, and inf·0 is NaN.
        s = tl.where((n < tokens)[None, :], s * (scale * LOG2_E), float("-inf"))
        p = tl.exp2(s - (row_lse * LOG2_E)[:, None])
        ds = p * (dp - row_delta[:, None])
        new_dq = ()
        for i in tl.static_range(OWNED):
            d = indices((split * OWNED + i) * BD, BD, WIDE)
            k = load_tile(k_base, n, d, strides[2], strides[1], tokens, D)
            new_dq = append(new_dq, tl.dot(ds.to(k.dtype), k, dq[i], input_precision=PRECISION))
        dq = new_dq

    dq_base, _, _ = head_rows(grad_qkv, sample, head, heads, grad_qkv_strides, D, HEADS_FIRST)
    for i in tl.static_range(OWNED):
        d = indices((split * OWNED + i) * BD, BD, WIDE)
        to = (grad_qkv_strides[2], grad_qkv_strides[1])
        store_tile(dq_base, dq[i] * scale, m, d, to[0], to[1], tokens, D)


def backward(
    qkv: Tensor,
    num_heads: int,
    order: str,
    out: Tensor,
    grad_out: Tensor,  # (N, C, T)
    grad_qkv: Tensor,  # (N, 3C, T)
) -> Callable[..., None]:
    """What serves calls with tensors like these: it takes qkv, the forward's out and lse and
    grad_out, and fills grad_qkv."""
    tokens, head_dim, tiles = prepare(qkv, num_heads)
    pairs = qkv.shape[0] * num_heads
    rows = min(32, max(16, triton.next_power_of_2(tokens)))
    blocks = triton.cdiv(tokens, rows)
    heads = int(num_heads)
    sum_up = Launch(
        delta_kernel, (blocks * pairs,), blocks, heads, tokens, out.stride(), grad_out.stride(),
        D=head_dim, WIDE=wide(out, grad_out), BD=tiles.keys.chunk, CHUNKS=tiles.keys.chunks,
        BM=rows, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip

    def launch_of(kernel: Any, cut: Tiles) -> Launch:
        blocks = triton.cdiv(tokens, cut.rows)
        return Launch(
            kernel, (blocks * cut.splits * pairs,), head_dim**-0.5, blocks, heads, tokens,
            qkv.stride(), grad_out.stride(), grad_qkv.stride(),
            **constants(head_dim, order, qkv.dtype, cut, qkv, grad_out, grad_qkv),
        )  # fmt: skip

    of_keys, of_queries = (
        launch_of(keys_kernel, tiles.keys),
        launch_of(queries_kernel, tiles.queries),
    )

    def launch(qkv, out, lse, grad_out, grad_qkv):
        delta = torch.empty_like(lse)
        sum_up(out, grad_out, delta)
        of_keys(qkv, grad_out, lse, delta, grad_qkv)
        of_queries(qkv, grad_out, lse, delta, grad_qkv)

    return launch

"""attention: softmax(q·kᵀ/√d)·v on the packed qkv projection, forward and backward, in Triton.

Layouts: qkv (N, 3C, T) with any strides, rows heads_first [h0q, h0k, h0v, h1q, …] or qkv_first
[Q | K | V]; out (N, C, T) with any strides; float32, bfloat16, float16. Softmax is float32.
Bytes moved: q once, k and v once per block of queries (from the L2 but for the first), out once.
Floor for (8, 6 heads, 1024 tokens, 64) bfloat16, forward: 16 µs at 790 TFLOP/s (H200).

Flash attention (Dao et al. 2022): a program holds a block of queries, walks over the keys with a
running maximum and sum, and rescales what it has summed. The backward recomputes the
probabilities from lse = log Σ exp: one kernel owns blocks of keys (dk, dv), one blocks of queries
(dq), so no sum is shared between programs and two runs are bit-equal.
The head dimension is cut into chunks: products over it sum chunk by chunk, and where its width
would not fit the registers, several programs each own some of the output's chunks and repeat the
scores. So head_dim 96 is three chunks of 32, 512 four of 128. Any token count.
"""

import functools
import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor

# NumPy has no bfloat16: the interpreter multiplies in float32.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Tensor cores round float32 operands to 11 bits: attention in float32 means float32.
FLOAT32_PRECISION = "tf32x3"


class Tiles(NamedTuple):
    """How one kernel cuts its work; see ``plan``."""

    chunk: int  # channels of a head dealt with at once
    chunks: int
    splits: int  # programs that share the chunks of the output
    rows: int  # what a program owns: queries, or keys in the dk, dv kernel
    columns: int  # what it walks over
    warps: int
    stages: int


class Plan(NamedTuple):
    forward: Tiles
    keys: Tiles  # dk, dv
    queries: Tiles  # dq


@functools.cache
def plan(head_dim: int, tokens: int, itemsize: int, programs: int, processors: int = 132) -> Plan:
    """The tiles of all three kernels, from shape and storage size alone.

    programs: samples × heads. Fewer rows where the grid would leave multiprocessors idle.
    """
    most = max(16, triton.next_power_of_2(tokens))

    def tiles(largest: int, owned: int, rows: int, columns: int, warps: int, stages: int) -> Tiles:
        """largest: chunk; owned: channels of the output one program accumulates."""
        chunk, chunks = _chunks(head_dim, largest)
        per_program = max(1, owned // chunk)
        splits = triton.cdiv(chunks, per_program)
        rows, columns = min(rows, most), min(columns, most)
        while rows > 32 and triton.cdiv(tokens, rows) * splits * programs < processors // 2:
            rows //= 2
        return Tiles(chunk, chunks, splits, rows, columns, warps, stages)

    if itemsize == 4:  # each operand stands in registers three times over
        return Plan(
            forward=tiles(32, 128, 32, 32 if head_dim <= 256 else 16, 8, 1),
            keys=tiles(32, 64, 32, 16, 8, 1),
            queries=tiles(32, 64, 32, 32, 8, 1),
        )
    if head_dim <= 64:
        return Plan(
            forward=tiles(64, 64, 128, 64, 4, 3),
            keys=tiles(64, 64, 64, 32, 4, 2),
            queries=tiles(64, 64, 64, 64, 4, 2),
        )
    if head_dim <= 128:
        return Plan(
            forward=tiles(128, 128, 128, 64, 8, 2),
            keys=tiles(128, 128, 64, 32, 8, 2),
            queries=tiles(128, 128, 64, 64, 8, 2),
        )
    return Plan(
        forward=tiles(128, 256, 64, 32, 8, 2),
        keys=tiles(64, 128, 64, 32 if head_dim <= 256 else 16, 8, 2),
        queries=tiles(64, 256, 64, 32, 8, 2),
    )


def _chunks(head_dim: int, most: int) -> tuple[int, int]:
    """The least padding in chunks of at most ``most``; of equals the fewest, and at most 8 chunks
    if that allows. Tensor cores want 32 or more."""
    smallest = min(most, 16 if head_dim < 64 else max(32, triton.next_power_of_2(head_dim) // 8))
    sizes = [size for size in (128, 64, 32, 16) if smallest <= size <= most]
    chunk = min(sizes, key=lambda size: triton.cdiv(head_dim, size) * size)
    return chunk, triton.cdiv(head_dim, chunk)


# --- Pieces of the kernels -------------------------------------------------------------------


@triton.jit
def load_tile(
    base,
    row,
    column,
    row_stride,
    column_stride,
    rows,
    columns,
):
    """A tile of base[row, column], zero outside (rows, columns), ready for tl.dot."""
    offsets = row[:, None] * row_stride + column[None, :] * column_stride
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(base + offsets, mask=mask, other=0.0)
    if INTERPRETED:
        value = value.to(tl.float32)
    return value


@triton.jit
def store_tile(base, value, row, column, row_stride, column_stride, rows, columns):
    offsets = row[:, None] * row_stride + column[None, :] * column_stride
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(base + offsets, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def indices(first, COUNT: tl.constexpr, WIDE: tl.constexpr):
    i = first + tl.arange(0, COUNT)
    if WIDE:  # tokens or channels far apart: their product with a stride passes 2^31
        i = i.to(tl.int64)
    return i


@triton.jit
def split_program(blocks, heads, SPLITS: tl.constexpr):
    """(block, split, head, sample) of this program; blocks of one head run side by side."""
    program = tl.program_id(0)
    block = program % blocks
    rest = program // blocks
    split = rest % SPLITS
    rest = rest // SPLITS
    return block, split, rest % heads, (rest // heads).to(tl.int64)


@triton.jit
def head_rows(base, sample, head, heads, strides, D: tl.constexpr, HEADS_FIRST: tl.constexpr):
    """Where q, k and v of one head begin; strides: (sample, channel, token)."""
    base += sample * strides[0]
    if HEADS_FIRST:
        q = base + head.to(tl.int64) * (3 * D) * strides[1]
        apart = D * strides[1]
    else:
        q = base + head.to(tl.int64) * D * strides[1]
        apart = (sample * 0 + heads) * D * strides[1]
    return q, q + apart, q + apart + apart


@triton.jit
def append(tiles, tile):
    return tiles + (tile,)


@triton.jit
def zeros(ROWS: tl.constexpr, BD: tl.constexpr, COUNT: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = append(tiles, tl.zeros((ROWS, BD), tl.float32))
    return tiles


@triton.jit
def products(
    a,  # (rows, channels), strides (token, channel)
    a_strides,
    b,
    b_strides,
    row,
    column,
    tokens,
    D: tl.constexpr,
    BD: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a[row]·b[column]ᵀ over the head's channels: (ROWS, COLUMNS)."""
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    # A loop kept rolled holds one chunk at a time; unrolled, every chunk of the operand that does
    # not change would be kept in shared memory and registers.
    for c in range(CHUNKS):
        d = indices(c * BD, BD, WIDE)
        left = load_tile(a, row, d, a_strides[2], a_strides[1], tokens, D)
        right = load_tile(b, d, column, b_strides[1], b_strides[2], D, tokens)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    return sums


# --- Forward ---------------------------------------------------------------------------------


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

    top = tl.full((BM,), float("-inf"), tl.float32)
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


# --- Backward --------------------------------------------------------------------------------


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
        p = tl.exp2(s * (scale * LOG2_E) - (row_lse * LOG2_E)[:, None])
        # Past the tokens k is zero, and so is what the other factor multiplies.
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


# --- Launchers -------------------------------------------------------------------------------


def forward(
    qkv: Tensor,  # (N, 3C, T)
    num_heads: int,
    order: str,
    out: Tensor,  # (N, C, T)
    lse: Tensor | None,  # float32 (N, H, T)
) -> None:
    """Fill ``out`` and, for a backward to come, ``lse`` = log Σ exp(scores)."""
    if qkv.numel() == 0:
        return
    tokens, head_dim, tiles = _prepare(qkv, num_heads)
    blocks = triton.cdiv(tokens, tiles.forward.rows)
    grid = (blocks * tiles.forward.splits * num_heads * qkv.shape[0],)
    forward_kernel[grid](
        qkv, out, lse, head_dim**-0.5, blocks, num_heads, tokens, qkv.stride(), out.stride(),
        HOLD=qkv.element_size() == 2,
        **_constants(head_dim, order, qkv.dtype, tiles.forward, qkv, out),
    )  # fmt: skip


def backward(
    qkv: Tensor,
    num_heads: int,
    order: str,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,  # (N, C, T)
    grad_qkv: Tensor,  # (N, 3C, T)
) -> None:
    """Fill ``grad_qkv``; ``out`` and ``lse`` are the forward's."""
    if qkv.numel() == 0:
        return
    tokens, head_dim, tiles = _prepare(qkv, num_heads)
    pairs = qkv.shape[0] * num_heads
    delta = torch.empty_like(lse)
    rows = min(32, max(16, triton.next_power_of_2(tokens)))
    blocks = triton.cdiv(tokens, rows)
    delta_kernel[(blocks * pairs,)](
        out, grad_out, delta, blocks, num_heads, tokens, out.stride(), grad_out.stride(),
        D=head_dim, WIDE=_wide(out, grad_out), BD=tiles.keys.chunk, CHUNKS=tiles.keys.chunks,
        BM=rows, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    for kernel, cut in ((keys_kernel, tiles.keys), (queries_kernel, tiles.queries)):
        blocks = triton.cdiv(tokens, cut.rows)
        kernel[(blocks * cut.splits * pairs,)](
            qkv, grad_out, lse, delta, grad_qkv, head_dim**-0.5, blocks, num_heads, tokens,
            qkv.stride(), grad_out.stride(), grad_qkv.stride(),
            **_constants(head_dim, order, qkv.dtype, cut, qkv, grad_out, grad_qkv),
        )  # fmt: skip


def _prepare(qkv: Tensor, num_heads: int) -> tuple[int, int, Plan]:
    samples, width, tokens = qkv.shape
    head_dim = width // (3 * num_heads)
    processors = _processors(qkv.device)
    tiles = plan(head_dim, tokens, qkv.element_size(), samples * num_heads, processors)
    return tokens, head_dim, tiles


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # H100, H200
    return torch.cuda.get_device_properties(device).multi_processor_count


def _constants(head_dim: int, order: str, dtype: torch.dtype, cut: Tiles, *tensors) -> dict:
    return dict(
        D=head_dim,
        HEADS_FIRST=order == "heads_first",
        WIDE=_wide(*tensors),
        PRECISION=FLOAT32_PRECISION if dtype == torch.float32 else "tf32",
        BD=cut.chunk,
        CHUNKS=cut.chunks,
        SPLITS=cut.splits,
        BM=cut.rows,
        BN=cut.columns,
        num_warps=cut.warps,
        num_stages=cut.stages,
        enable_fp_fusion=True,
    )


def _wide(*tensors: Tensor) -> bool:
    """Whether an offset within a sample, padding included, can pass 2^31."""
    return any(
        (t.shape[1] + 256) * abs(t.stride(1)) + (t.shape[2] + 256) * abs(t.stride(2)) >= 2**31
        for t in tensors
    )

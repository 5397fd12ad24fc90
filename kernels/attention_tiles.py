"""What the kernels of attention share: the choice of tiles, and the pieces they are made of.

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
LEAST = tl.constexpr(torch.finfo(torch.float32).min)
# Tensor cores round float32 operands to 11 bits: attention in float32 means float32.
FLOAT32_PRECISION = "tf32x3"


class Tiles(NamedTuple):
    """How one kernel cuts its work; see ``choose_tiles``."""

    chunk: int  # channels of a head dealt with at once
    chunks: int
    splits: int  # programs that share the chunks of the output
    rows: int  # what a program owns: queries, or keys in the dk, dv kernel
    columns: int  # what it walks over
    warps: int
    stages: int


class KernelTiles(NamedTuple):
    forward: Tiles
    keys: Tiles  # dk, dv
    queries: Tiles  # dq


@functools.cache
def choose_tiles(head_dim: int, tokens: int, itemsize: int) -> KernelTiles:
    """The tiles of all three kernels, from shape and storage size alone.

    Not from the batch, for which a network would be compiled anew. Blocks of fewer rows would keep
    more multiprocessors busy for one image (4 heads of 256 tokens: 32 programs in place of 8), for
    about a microsecond a call, but tensor cores want 64 rows or more.
    """
    most = max(16, triton.next_power_of_2(tokens))

    def tiles(largest: int, owned: int, rows: int, columns: int, warps: int, stages: int) -> Tiles:
        """largest: chunk; owned: channels of the output one program accumulates."""
        chunk, chunks = _chunks(head_dim, largest)
        per_program = max(1, owned // chunk)
        splits = triton.cdiv(chunks, per_program)
        return Tiles(chunk, chunks, splits, min(rows, most), min(columns, most), warps, stages)

    if itemsize == 4:  # each operand stands in registers three times over
        return KernelTiles(
            forward=tiles(32, 128, 32, 32 if head_dim <= 256 else 16, 8, 1),
            keys=tiles(32, 64, 32, 16, 8, 1),
            queries=tiles(32, 64, 32, 32, 8, 1),
        )
    if head_dim <= 64:
        return KernelTiles(
            forward=tiles(64, 64, 128, 64, 4, 3),
            keys=tiles(64, 64, 64, 32, 4, 2),
            queries=tiles(64, 64, 64, 64, 4, 2),
        )
    if head_dim <= 128:
        return KernelTiles(
            forward=tiles(128, 128, 128, 64, 8, 2),
            keys=tiles(128, 128, 64, 32, 8, 2),
            queries=tiles(128, 128, 64, 64, 8, 2),
        )
    return KernelTiles(
        forward=tiles(128, 256, 64, 32, 8, 2),
        keys=tiles(64, 128, 64, 32 if head_dim <= 256 else 16, 8, 2),
        # Chunks wider than the rows: else Ampere's warps stand in a column, of which 64 rows fill
        # half, and hold each sum twice. Where those are too much padding, fewer sums fit.
        queries=tiles(128, 256 if head_dim <= 256 or head_dim % 128 == 0 else 128, 64, 32, 8, 2),
    )


def _chunks(head_dim: int, most: int) -> tuple[int, int]:
    """The least padding in chunks of at most ``most``; of equals the fewest, and at most 8 chunks
    if that allows. Tensor cores want 32 or more."""
    smallest = min(most, 16 if head_dim < 64 else max(32, triton.next_power_of_2(head_dim) // 8))
    sizes = [size for size in (128, 64, 32, 16) if smallest <= size <= most]
    chunk = min(sizes, key=lambda size: triton.cdiv(head_dim, size) * size)
    return chunk, triton.cdiv(head_dim, chunk)


def prepare(qkv: Tensor, num_heads: int) -> tuple[int, int, KernelTiles]:
    _, width, tokens = qkv.shape
    head_dim = width // (3 * num_heads)
    return tokens, head_dim, choose_tiles(head_dim, tokens, qkv.element_size())


def constants(head_dim: int, order: str, dtype: torch.dtype, cut: Tiles, *tensors) -> dict:
    """Of every kernel but delta's; ``tensors``: what it reads and writes with strides."""
    return dict(
        D=head_dim,
        HEADS_FIRST=order == "heads_first",
        WIDE=wide(*tensors),
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


def wide(*tensors: Tensor) -> bool:
    """Whether an offset within a sample, padding included, can pass 2^31."""
    return any(
        (t.shape[1] + 256) * abs(t.stride(1)) + (t.shape[2] + 256) * abs(t.stride(2)) >= 2**31
        for t in tensors
    )


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

"""What the kernels of group_norm_silu share: the choice of tiles, and the pieces they are made of.

A tile is (channels of whole groups) × (positions), in the registers of one program. Its sums run
over the positions first and over the channels of a group second, so any number of channels per
group serves, and both layouts differ in nothing but offsets.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .device import H200, processors_of

Tensor = torch.Tensor
NO_ADD, ADD_PER_CHANNEL, ADD_PER_ELEMENT = 0, 1, 2


class Plan(NamedTuple):
    """Tiles of one call: see ``choose_tiles``."""

    read_once: bool
    width: int  # channels of a slab: whole groups, or a part of one
    parts: int  # slabs per group where a group has more channels than a tile
    tile_channels: int  # width padded to a power of two
    tile_positions: int
    chunks: int  # tiles along the positions
    warps: int


# Elements one program may hold before registers spill, by (backward, channels_last): 32 values a
# thread and 1024 threads, half of them where dy is held too, and half again where every thread
# meets several channels and keeps their coefficients.
MOST = {
    (False, False): 32768,
    (False, True): 16384,
    (True, False): 16384,
    (True, True): 8192,
}
CHUNK = 8192  # where several tiles make a group: three or four programs fit a multiprocessor
SMALL = 2048  # below this a program's start costs more than its work: take several groups
LEAST, LINE = 16, 128  # bytes side by side: half a sector of memory, and what a warp should cover


@functools.cache
def choose_tiles(
    samples: int,
    channels: int,
    groups: int,
    positions: int,
    itemsize: int,
    channels_last: bool,
    backward: bool,
    processors: int = H200,
) -> Plan:
    """The tiles for one call: a pure function of shape, layout, storage size and GPU."""
    group = channels // groups
    most = MOST[backward, channels_last]
    padded_positions = triton.next_power_of_2(positions)

    best: int | None = None
    for count in range(1, groups + 1):  # groups side by side in one slab
        width = count * group
        tile_channels = triton.next_power_of_2(width)
        # The sums over groups compare channels pairwise: 128² is what stays small.
        if groups % count or (count > 1 and tile_channels > 128):
            continue
        tile = tile_channels * padded_positions
        if tile > most:
            break
        enough = samples * groups // count >= 2 * processors
        if not channels_last:  # a group is one run: more only where it is small
            better = best is None or (tile <= SMALL and enough)
        else:  # cover half sectors always, and lines while the programs suffice
            fits_line = width * itemsize <= LINE
            better = best is None or best * group * itemsize < LEAST or (fits_line and enough)
        if better:
            best = count
    covers = not channels_last or (
        best is not None and (best * group * itemsize >= LEAST or best == groups)
    )
    if best is not None and covers:
        width = best * group
        tile_channels = triton.next_power_of_2(width)
        tile = tile_channels * padded_positions
        warps = min(_warps(2 * tile), 16) if backward else _warps(tile)
        return Plan(True, width, 1, tile_channels, padded_positions, 1, warps)

    if channels_last:
        line = LINE // itemsize
        fitting = [k for k in range(1, groups + 1) if groups % k == 0 and k * group <= line]
        width = fitting[-1] * group if fitting else min(group, line)
        tile_positions = min(padded_positions, CHUNK // triton.next_power_of_2(width))
    else:
        tile_positions = max(CHUNK // triton.next_power_of_2(group), min(512, padded_positions))
        tile_positions = min(tile_positions, padded_positions)
        width = min(group, CHUNK // tile_positions)
        width = triton.cdiv(group, triton.cdiv(group, width))  # parts of one size
    tile_channels = triton.next_power_of_2(width)
    return Plan(
        False,
        width,
        max(1, triton.cdiv(group, width)),
        tile_channels,
        tile_positions,
        triton.cdiv(positions, tile_positions),
        _warps(tile_channels * tile_positions),
    )


def _warps(values: int) -> int:
    """32 values a thread: their loads hide the latency of one another.

    The backward that reads once holds x and dy: 64 values a thread, where 1024 threads would leave
    64 registers for 32 values and what surrounds them.
    """
    return min(32, max(1, values // 1024))


class Launch(NamedTuple):
    """What both directions derive from their arguments."""

    tiles: Plan
    samples: int
    channels: int
    positions: int
    slabs: int  # per sample
    strides: tuple[int, int, int]  # rows of scale, shift and add
    constants: dict  # of every kernel that places tiles


def prepare(x: Tensor, groups: int, scale, shift, add, backward: bool) -> Launch:
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    channels_last = not x.is_contiguous()
    tiles = choose_tiles(
        samples,
        channels,
        groups,
        positions,
        x.element_size(),
        channels_last,
        backward,
        processors_of(x.device),
    )
    scale_stride, shift_stride, add_stride = (
        t.stride(0) if t is not None else 0 for t in (scale, shift, add)
    )
    strides = scale_stride, shift_stride, add_stride
    if add is None:
        kind = NO_ADD
    else:
        kind = ADD_PER_CHANNEL if add.dim() == 2 else ADD_PER_ELEMENT
    reach = max(tiles.tile_channels * positions, tiles.tile_positions * channels)
    constants = dict(
        ADD=kind,
        GROUP=channels // groups,
        WIDTH=tiles.width,
        CHANNELS_LAST=channels_last,
        WIDE=reach >= 2**31,
        CB=tiles.tile_channels,
        SB=tiles.tile_positions,
        num_warps=tiles.warps,
        num_stages=1,
        enable_fp_fusion=True,
    )
    slabs = groups * tiles.parts if tiles.parts > 1 else channels // tiles.width
    return Launch(tiles, samples, channels, positions, slabs, strides, constants)


# --- Pieces of the kernels -------------------------------------------------------------------


@triton.jit
def split_program(program, slabs, chunks):
    """(sample, slab, chunk) of a program; chunks of one slab run side by side."""
    chunk = program % chunks
    rest = program // chunks
    return (rest // slabs).to(tl.int64), rest % slabs, chunk


@triton.jit
def place(
    sample,
    slab,
    chunk,
    channels,
    positions,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CB: tl.constexpr,
    SB: tl.constexpr,
):
    """The tile's channels and which count (CB,), its origin in x, offsets and mask (CB, SB)."""
    lane = tl.arange(0, CB)
    if PARTS == 1:
        first = slab * WIDTH
        inside = lane < WIDTH
    else:
        part = slab % PARTS
        first = (slab // PARTS) * GROUP + part * WIDTH
        inside = lane < tl.minimum(WIDTH, GROUP - part * WIDTH)
    position = chunk * SB
    step = tl.arange(0, SB)
    mask = inside[:, None] & (position + step < positions)[None, :]
    start = sample * channels * positions
    if WIDE:
        step = step.to(tl.int64)
        row = lane.to(tl.int64)
    else:
        row = lane
    if CHANNELS_LAST:
        start += position.to(tl.int64) * channels + first
        offsets = step[None, :] * channels + row[:, None]
    else:
        start += first.to(tl.int64) * positions + position
        offsets = row[:, None] * positions + step[None, :]
    return first + lane, inside, start, offsets, mask


@triton.jit
def read(
    x,
    add,
    add_stride,
    sample,
    channel,
    inside,
    start,
    offsets,
    mask,
    ADD: tl.constexpr,
):
    """x + add in float32, 0 outside; (CB, SB)."""
    value = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32)
    if ADD == 1:
        more = tl.load(add + sample * add_stride + channel, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(mask, value + more[:, None], 0.0)
    elif ADD == 2:
        value += tl.load(add + start + offsets, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def over_group(v, GROUP: tl.constexpr, WIDTH: tl.constexpr, CB: tl.constexpr):
    """Σ over the channels of each channel's group in the slab: (CB,) → (CB,)."""
    if WIDTH <= GROUP:
        return tl.zeros((CB,), tl.float32) + tl.sum(v, 0)
    group = tl.arange(0, CB) // GROUP
    same = group[:, None] == group[None, :]
    return tl.sum(tl.where(same, v[None, :], 0.0), 1)


@triton.jit
def moments(v, mask, count, GROUP: tl.constexpr, WIDTH: tl.constexpr, CB: tl.constexpr):
    """v − rough, mean − rough, rough and Σ(v − mean)²; the last three per channel's group.

    ``rough`` is the mean up to its rounding, which matters where mean ≫ std.
    """
    rough = over_group(tl.sum(v, 1), GROUP, WIDTH, CB) / count
    d = tl.where(mask, v - rough[:, None], 0.0)
    rest = over_group(tl.sum(d, 1), GROUP, WIDTH, CB) / count
    m2 = over_group(tl.sum(d * d, 1), GROUP, WIDTH, CB) - rest * rest * count
    return d, rest, rough, tl.maximum(m2, 0.0)


@triton.jit
def coefficients(
    weight,
    bias,
    scale,
    shift,
    scale_stride,
    shift_stride,
    sample,
    channel,
    inside,
    CB: tl.constexpr,
):
    """(A, B) of v = A·x̂ + B: weight·(1 + scale), bias·(1 + scale) + shift; (CB,)."""
    a = tl.full((CB,), 1.0, tl.float32)
    b = tl.zeros((CB,), tl.float32)
    if weight is not None:
        a = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        at = scale + sample * scale_stride + channel
        film = 1.0 + tl.load(at, mask=inside, other=0.0).to(tl.float32)
        a *= film
        b *= film
    if shift is not None:
        at = shift + sample * shift_stride + channel
        b += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def inverse_std(m2, count, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(m2 / count + eps))


@triton.jit
def apply_silu(v):
    return v / (1.0 + tl.exp(-v))


@triton.jit
def through_silu(dy, v):
    """dy·silu′(v)."""
    sigmoid = 1.0 / (1.0 + tl.exp(-v))
    return dy * (sigmoid * (1.0 + v * (1.0 - sigmoid)))

"""What the kernels of group_norm_silu share: the choice of tiles, and the pieces they are made of.

A tile is (channels of whole groups) × (positions), in the registers of one program. Its sums run
over the positions first and over the channels of a group second, so any number of channels per
group serves, and both layouts differ in nothing but offsets.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor
NO_ADD, ADD_PER_CHANNEL, ADD_PER_ELEMENT = 0, 1, 2
# What no kernel is compiled anew for: neither another batch nor another width of the groups.
UNSPECIALIZED = ["group", "width", "parts", "slabs", "chunks", "total", "samples"]
UNSPECIALIZED += ["plane", "sums_plane", "constants_plane", "partial_plane"]


class Plan(NamedTuple):
    """Tiles of one layer: see ``choose_tiles``."""

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
LEAST_SLABS = 8  # of a sample that small, of which then 17 fill 132 multiprocessors
PAIRWISE = 64  # channels that the sums over groups compare with one another: 64² stays small
# Bytes side by side: half a sector of memory, a sector, and what a warp should cover.
LEAST, SECTOR, LINE = 16, 32, 128


@functools.cache
def choose_tiles(
    channels: int, groups: int, positions: int, itemsize: int, channels_last: bool, backward: bool
) -> Plan:
    """The tiles for one layer: a pure function of its shape, layout and storage size.

    Not of the batch, for which a network would be compiled anew. A slab therefore never takes more
    groups than it needs to read whole sectors of memory, or to be worth a program's start. Against
    tiles chosen for the batch this costs, in bytes moved, nothing: whole sectors are read once. In
    occupancy: one image in channels_last has C / 16 programs (bfloat16) where it could have C / 8,
    each of twice the work, below a microsecond on 132 multiprocessors that its 4 to 64 programs
    leave idle anyway; a batch of 64 has rows of 32 bytes where it could have 128, hence four
    times as many programs, of which four or five fit a multiprocessor in place of one.
    """
    group = channels // groups
    most = MOST[backward, channels_last]
    padded_positions = triton.next_power_of_2(positions)

    best: int | None = None
    for count in range(1, groups + 1):  # groups side by side in one slab
        width = count * group
        tile_channels = triton.next_power_of_2(width)
        if groups % count or (count > 1 and tile_channels > PAIRWISE):
            continue
        tile = tile_channels * padded_positions
        if tile > most:
            break
        small = tile <= SMALL and groups // count >= LEAST_SLABS
        if best is None or small or (channels_last and best * group * itemsize < SECTOR):
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


class Cut(NamedTuple):
    """What both directions derive from their arguments."""

    tiles: Plan
    samples: int
    group: int  # channels of one
    channels: int
    positions: int
    slabs: int  # per sample
    strides: tuple[bool, int, int, int]  # whether FiLM counts, then rows: of scale, shift, add
    constants: dict  # of every kernel that places tiles
    exact: dict  # of those that read once: what of the tile they need neither mask nor compute

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """What every kernel that places tiles is told of them: channels, positions, group, width
        (in units of ALIGN) and slabs."""
        width = self.tiles.width // self.constants["ALIGN"]
        return self.channels, self.positions, self.group, width, self.slabs


def normalised(x: Tensor, weight, bias, scale, shift, add) -> tuple:
    """What a kernel that normalises x is given of them. Without FiLM x stands in for it and is not
    read: one kernel serves both."""
    return (x, weight, bias, x, x, add) if scale is None else (x, weight, bias, scale, shift, add)


def prepare(
    x: Tensor, groups: int, scale, shift, add, backward: bool, more: int | None = None
) -> Cut:
    """``more``: of residual_norm, the channels of its second tensor."""
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    channels += more or 0
    group = channels // groups
    channels_last = not x.is_contiguous()
    itemsize = x.element_size()
    tiles = choose_tiles(channels, groups, positions, itemsize, channels_last, backward)
    film = (False, 0, 0) if scale is None else (True, scale.stride(0), shift.stride(0))
    if add is None:
        kind = NO_ADD
    else:
        kind = ADD_PER_CHANNEL if add.dim() == 2 else ADD_PER_ELEMENT
    reach = max(tiles.tile_channels * positions, tiles.tile_positions * channels)
    # One kernel serves all shapes that share a small tile; a large one is worth a compilation.
    small = tiles.tile_channels * tiles.tile_positions <= SMALL
    general = small and tiles.tile_channels <= PAIRWISE
    exact = dict(EXACT=positions == tiles.tile_positions, WIDTH=0 if small else tiles.width)
    if exact["EXACT"] and tiles.warps >= 8 and not (channels_last or backward) and more is None:
        exact["maxnreg"] = 64  # enough, and two programs of 512 threads fit a multiprocessor
    constants = dict(
        ADD=kind,
        SPAN=math.gcd(group, 4) if general or tiles.width > group else 0,
        ALIGN=math.gcd(tiles.width, 16 // itemsize) if channels_last else 1,
        CHANNELS_LAST=channels_last,
        WIDE=reach >= 2**31,
        CB=tiles.tile_channels,
        SB=tiles.tile_positions,
        num_warps=tiles.warps,
        num_stages=1,
        enable_fp_fusion=True,
    )
    slabs = groups * tiles.parts if tiles.parts > 1 else channels // tiles.width
    strides = (*film, 0 if add is None else add.stride(0))
    return Cut(tiles, samples, group, channels, positions, slabs, strides, constants, exact)


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
    group,
    width,
    parts,
    SPAN: tl.constexpr,  # 0: a slab is of one group; or neighbours that certainly share theirs
    PARTED: tl.constexpr,  # several slabs make a group
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CB: tl.constexpr,
    SB: tl.constexpr,
):
    """The tile's channels, their groups' rows in mean and rstd, which channels count (CB,), the
    tile's origin in x, offsets and mask (CB, SB)."""
    lane = tl.arange(0, CB)
    row = lane * 0 + slab
    if PARTED:
        part = slab % parts
        row = lane * 0 + slab // parts
        first = (slab // parts) * group + part * width
        inside = lane < tl.minimum(width, group - part * width)
    else:
        first = slab * width
        inside = lane < width
        if SPAN:
            row = slab * (width // group) + group_in_slab(group, SPAN, CB)
            row = tl.minimum(row, channels // group - 1)  # so that no load needs a mask
    position = chunk * SB
    step = tl.arange(0, SB)
    mask = inside[:, None] & (position + step < positions)[None, :]
    start = sample * channels * positions
    if WIDE:
        step = step.to(tl.int64)
        lane = lane.to(tl.int64)
    if CHANNELS_LAST:
        start += position.to(tl.int64) * channels + first
        offsets = step[None, :] * channels + lane[:, None]
    else:
        start += first.to(tl.int64) * positions + position
        offsets = lane[:, None] * positions + step[None, :]
    row += sample * (channels // group)
    return first + tl.arange(0, CB), row, inside, start, offsets, mask


@triton.jit
def group_in_slab(group, SPAN: tl.constexpr, CB: tl.constexpr):
    """lane // group, (CB,): one division for all lanes, exact where CB·group < 2^16, and one number
    for all of a span, as the compiler sees, which then loads what belongs to it once."""
    return (tl.arange(0, CB) // SPAN * (65536 * SPAN // group + 1)) >> 16


@triton.jit
def leads(group, inside, SPAN: tl.constexpr, CB: tl.constexpr):
    """The first channel of each group in the slab, which speaks for it; (CB,)."""
    lane = tl.arange(0, CB)
    first = 0
    if SPAN:
        first = group_in_slab(group, SPAN, CB) * group
    return inside & (lane == first)


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
def read_joined(
    x,
    residual,  # or None, as what follows
    bias,
    second,
    total,  # x itself, where the sum is to stand there
    split,  # channels of x
    sample,
    channel,
    chunk,
    inside,
    start,
    offsets,
    mask,
    channels,
    positions,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    SB: tl.constexpr,
):
    """The channels of total = x + residual + bias, rounded as it is written, then those of second,
    in float32, 0 outside; (CB, SB)."""
    own = mask
    at = start
    places = offsets
    if second is not None:
        own = mask & (channel < split)[:, None]
        at, places = in_part(
            start, offsets, sample, chunk, channels - split, 0, positions, CHANNELS_LAST, WIDE, SB
        )
    value = tl.load(x + at + places, mask=own, other=0.0)
    if residual is not None or bias is not None:
        wide = value.to(tl.float32)
        if residual is not None:
            wide += tl.load(residual + at + places, mask=own, other=0.0).to(tl.float32)
        if bias is not None:
            more = tl.load(bias + channel, mask=inside & (channel < split), other=0.0)
            wide = tl.where(own, wide + more.to(tl.float32)[:, None], 0.0)
        value = wide.to(x.dtype.element_ty)
    if total is not None:
        tl.store(total + at + places, value, mask=own)
    value = value.to(tl.float32)
    if second is not None:
        at, places = in_part(
            start, offsets, sample, chunk, split, split, positions, CHANNELS_LAST, WIDE, SB
        )
        rest = mask & (channel >= split)[:, None]
        value += tl.load(second + at + places, mask=rest, other=0.0).to(tl.float32)
    return value


@triton.jit
def in_part(
    start,
    offsets,
    sample,
    chunk,
    missing,
    before,
    positions,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    SB: tl.constexpr,
):
    """A tile's origin and offsets in a tensor of ``missing`` channels less, of which ``before``
    come before its own."""
    rows = sample * positions
    if CHANNELS_LAST:
        step = tl.arange(0, SB)
        if WIDE:
            step = step.to(tl.int64)
        rows += chunk * SB
        return start - rows * missing - before, offsets - step[None, :] * missing
    return start - rows * missing - before * tl.cast(positions, tl.int64), offsets


@triton.jit
def over_group(v, group, SPAN: tl.constexpr, CB: tl.constexpr):
    """Σ over the channels of each channel's group in the slab: (CB,) → (CB,)."""
    if not SPAN:
        return tl.zeros((CB,), tl.float32) + tl.sum(v, 0)
    own = group_in_slab(group, SPAN, CB)
    same = own[:, None] == own[None, :]
    return tl.sum(tl.where(same, v[None, :], 0.0), 1)


@triton.jit
def moments(v, mask, count, group, SPAN: tl.constexpr, CB: tl.constexpr):
    """v − rough, mean − rough, rough and Σ(v − mean)²; the last three per channel's group.

    ``rough`` is the mean up to its rounding, which matters where mean ≫ std.
    """
    rough = over_group(tl.sum(v, 1), group, SPAN, CB) / count
    d = tl.where(mask, v - rough[:, None], 0.0)
    rest = over_group(tl.sum(d, 1), group, SPAN, CB) / count
    m2 = over_group(tl.sum(d * d, 1), group, SPAN, CB) - rest * rest * count
    return d, rest, rough, tl.maximum(m2, 0.0)


@triton.jit
def coefficients(
    weight,
    bias,
    scale,
    shift,
    film,  # whether scale and shift count
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
        factor = 1.0 + tl.load(at, mask=inside & film, other=0.0).to(tl.float32)
        a *= factor
        b *= factor
    if shift is not None:
        at = shift + sample * shift_stride + channel
        b += tl.load(at, mask=inside & film, other=0.0).to(tl.float32)
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

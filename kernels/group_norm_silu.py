"""group_norm_silu: GroupNorm, FiLM and SiLU, forward and backward, in Triton.

    y = act(((x + add − mean)·rstd·weight + bias)·(1 + scale) + shift)

Layouts: x (N, C, *spatial) contiguous or channels_last; float32, bfloat16, float16; parameters and
FiLM in any of them. Arithmetic and statistics are float32.
Bytes moved, with B the bytes of x: 2B forward and 3B backward where a group fits one program's
registers, else 3B and 5B, of which the last B and 2B come from the L2 as far as it holds them.
Floor for (8, 256, 32, 32) bfloat16, forward: 2.0 µs at 4.3 TB/s (H200).

A tile is (channels of whole groups) × (positions), in registers. Its sums run over the positions
first and over the channels of a group second, so any number of channels per group serves.
- read once: a tile holds all positions; two sweeps over registers give mean and M2 = Σ(x − mean)².
- chunks: tiles write (mean, M2) to a workspace, a small kernel merges them in order (Chan, Golub &
  LeVeque 1979), a third reads x again, last tile first: that is what the L2 still holds.
Deterministic: no atomics. Range: any C, any group of 2 elements or more, 64-bit offsets.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor
NO_ADD, ADD_PER_CHANNEL, ADD_PER_ELEMENT = 0, 1, 2


class Device(NamedTuple):
    """What of a GPU the choice of tiles rests on."""

    processors: int = 132  # H100, H200


class Plan(NamedTuple):
    """Tiles of one call: see ``plan``."""

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


@functools.lru_cache(maxsize=None)
def plan(
    samples: int,
    channels: int,
    groups: int,
    positions: int,
    itemsize: int,
    channels_last: bool,
    backward: bool,
    device: Device = Device(),  # noqa: B008 (immutable)
) -> Plan:
    """The tiles for one call: a pure function of shape, layout, storage size and device."""
    group = channels // groups
    most = MOST[backward, channels_last]
    padded_positions = triton.next_power_of_2(positions)

    best = None
    for count in range(1, groups + 1):  # groups side by side in one slab
        width = count * group
        tile_channels = triton.next_power_of_2(width)
        # The sums over groups compare channels pairwise: 128² is what stays small.
        if groups % count or (count > 1 and tile_channels > 128):
            continue
        tile = tile_channels * padded_positions
        if tile > most:
            break
        enough = samples * groups // count >= 2 * device.processors
        if not channels_last:  # a group is one run: more only where it is small
            better = best is None or (tile <= SMALL and enough)
        else:  # cover half sectors always, and lines while the programs suffice
            line = width * itemsize <= LINE
            better = best is None or best * group * itemsize < LEAST or (line and enough)
        if better:
            best = count
    covers = not channels_last or (
        best is not None and (best * group * itemsize >= LEAST or best == groups)
    )
    if best is not None and covers:
        width = best * group
        tile_channels = triton.next_power_of_2(width)
        warps = _warps(tile_channels * padded_positions, backward)
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
    tile_channels = triton.next_power_of_2(width)
    return Plan(
        False,
        width,
        max(1, triton.cdiv(group, width)),
        tile_channels,
        tile_positions,
        triton.cdiv(positions, tile_positions),
        _warps(tile_channels * tile_positions, backward),
    )


def _warps(tile: int, backward: bool) -> int:
    """32 values a thread hide the latency of one another; dy doubles what backward holds."""
    return min(32, max(1, tile // 1024)) if not backward else min(16, max(1, tile // 512))


# --- Pieces of the kernels -------------------------------------------------------------------


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
    """The tile's channels (CB,), which of them count, its origin in x, offsets and mask (CB, SB)."""
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
def silu(v):
    return v / (1.0 + tl.exp(-v))


@triton.jit
def through_silu(dy, v):
    """dy·silu′(v)."""
    sigmoid = 1.0 / (1.0 + tl.exp(-v))
    return dy * (sigmoid * (1.0 + v * (1.0 - sigmoid)))


# --- Forward ---------------------------------------------------------------------------------


@triton.jit
def forward_once_kernel(
    x,
    weight,
    bias,
    scale,
    shift,
    add,
    y,
    mean_out,
    rstd_out,
    scale_stride,
    shift_stride,
    add_stride,
    channels,
    positions,
    slabs,
    eps,
    ADD: tl.constexpr,
    SILU: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CB: tl.constexpr,
    SB: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // slabs).to(tl.int64)
    slab = program % slabs
    channel, inside, start, offsets, mask = place(
        sample, slab, slab * 0, channels, positions,
        GROUP, WIDTH, 1, CHANNELS_LAST, WIDE, CB, SB,
    )  # fmt: skip
    v = read(x, add, add_stride, sample, channel, inside, start, offsets, mask, ADD)
    a, b = coefficients(
        weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside, CB
    )
    count = 1.0 * GROUP * positions  # a float before it can overflow
    d, rest, rough, m2 = moments(v, mask, count, GROUP, WIDTH, CB)
    rstd = inverse_std(m2, count, eps)

    v = (d - rest[:, None]) * (rstd * a)[:, None] + b[:, None]
    if SILU:
        v = silu(v)
    tl.store(y + start + offsets, v.to(y.dtype.element_ty), mask=mask)
    lead = inside & (channel % GROUP == 0)
    at = sample * (channels // GROUP) + channel // GROUP
    tl.store(mean_out + at, rough + rest, mask=lead)
    tl.store(rstd_out + at, rstd, mask=lead)


@triton.jit
def moments_kernel(
    x,
    add,
    partial,  # (2, N, G, PARTS·chunks): mean, M2
    plane,  # elements from the one to the other
    add_stride,
    channels,
    positions,
    slabs,
    chunks,
    ADD: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CB: tl.constexpr,
    SB: tl.constexpr,
):
    program = tl.program_id(0)
    chunk = program % chunks
    slab = (program // chunks) % slabs
    sample = (program // chunks // slabs).to(tl.int64)
    channel, inside, start, offsets, mask = place(
        sample, slab, chunk, channels, positions,
        GROUP, WIDTH, PARTS, CHANNELS_LAST, WIDE, CB, SB,
    )  # fmt: skip
    v = read(x, add, add_stride, sample, channel, inside, start, offsets, mask, ADD)
    part = slab % PARTS
    count = part_count(part, chunk, positions, GROUP, WIDTH, PARTS, SB)
    d, rest, rough, m2 = moments(v, mask, count, GROUP, WIDTH, CB)

    groups = channels // GROUP
    if PARTS == 1:
        lead = inside & (channel % GROUP == 0)
    else:
        lead = tl.arange(0, CB) == 0
    at = ((sample * groups + channel // GROUP) * PARTS + part) * chunks + chunk
    tl.store(partial + at, rough + rest, mask=lead)
    tl.store(partial + plane + at, m2, mask=lead)


@triton.jit
def part_count(
    part,
    chunk,
    positions,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    SB: tl.constexpr,
):
    """Elements of one group in a tile, in float32."""
    length = tl.minimum(positions - chunk * SB, SB).to(tl.float32)
    if PARTS == 1:
        return length * GROUP
    return length * tl.minimum(GROUP - part * WIDTH, WIDTH).to(tl.float32)


@triton.jit
def merge_kernel(
    partial,
    plane,
    mean_out,
    rstd_out,
    positions,
    chunks,
    eps,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    SB: tl.constexpr,
    TOTAL: tl.constexpr,  # PARTS·chunks
    BLOCK: tl.constexpr,
):
    """One program merges the moments of one group: blocks of BLOCK in order."""
    row = tl.program_id(0).to(tl.int64)
    pivot = tl.load(partial + row * TOTAL)
    count = 0.0
    mean = 0.0  # less the pivot, which the means are near
    m2 = 0.0
    for start in range(0, TOTAL, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < TOTAL
        n = part_count(i // chunks, i % chunks, positions, GROUP, WIDTH, PARTS, SB)
        n = tl.where(mask, n, 0.0)
        part_mean = tl.load(partial + row * TOTAL + i, mask=mask, other=0.0) - pivot
        part_m2 = tl.load(partial + plane + row * TOTAL + i, mask=mask, other=0.0)
        block_count = tl.sum(n, 0)
        block_mean = tl.sum(tl.where(mask, n * part_mean, 0.0), 0) / block_count
        d = tl.where(mask, part_mean - block_mean, 0.0)
        block_m2 = tl.sum(part_m2 + n * d * d, 0)
        total = count + block_count
        delta = block_mean - mean
        mean += delta * (block_count / total)
        m2 += block_m2 + delta * delta * (count * block_count / total)
        count = total
    tl.store(mean_out + row, pivot + mean)
    tl.store(rstd_out + row, inverse_std(m2, count, eps))


@triton.jit
def forward_apply_kernel(
    x,
    weight,
    bias,
    scale,
    shift,
    add,
    y,
    mean_in,
    rstd_in,
    scale_stride,
    shift_stride,
    add_stride,
    channels,
    positions,
    slabs,
    chunks,
    ADD: tl.constexpr,
    SILU: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CB: tl.constexpr,
    SB: tl.constexpr,
):
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards: the L2 holds the end of x
    chunk = program % chunks
    slab = (program // chunks) % slabs
    sample = (program // chunks // slabs).to(tl.int64)
    channel, inside, start, offsets, mask = place(
        sample, slab, chunk, channels, positions,
        GROUP, WIDTH, PARTS, CHANNELS_LAST, WIDE, CB, SB,
    )  # fmt: skip
    v = read(x, add, add_stride, sample, channel, inside, start, offsets, mask, ADD)
    a, b = coefficients(
        weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside, CB
    )
    at = sample * (channels // GROUP) + channel // GROUP
    mean = tl.load(mean_in + at, mask=inside, other=0.0)
    a *= tl.load(rstd_in + at, mask=inside, other=0.0)
    v = (v - mean[:, None]) * a[:, None] + b[:, None]
    if SILU:
        v = silu(v)
    tl.store(y + start + offsets, v.to(y.dtype.element_ty), mask=mask)


# --- Backward --------------------------------------------------------------------------------


@triton.jit
def gradient_tile(
    dy,
    x,
    weight,
    bias,
    scale,
    shift,
    add,
    mean_in,
    rstd_in,
    scale_stride,
    shift_stride,
    add_stride,
    sample,
    channel,
    inside,
    start,
    offsets,
    mask,
    channels,
    ADD: tl.constexpr,
    SILU: tl.constexpr,
    GROUP: tl.constexpr,
    CB: tl.constexpr,
):
    """dv and x̂ (CB, SB), zero outside; A and rstd (CB,)."""
    v = read(x, add, add_stride, sample, channel, inside, start, offsets, mask, ADD)
    dv = tl.load(dy + start + offsets, mask=mask, other=0.0).to(tl.float32)
    a, b = coefficients(
        weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside, CB
    )
    at = sample * (channels // GROUP) + channel // GROUP
    mean = tl.load(mean_in + at, mask=inside, other=0.0)
    rstd = tl.load(rstd_in + at, mask=inside, other=0.0)
    normal = tl.where(mask, (v - mean[:, None]) * rstd[:, None], 0.0)
    if SILU:
        dv = through_silu(dv, normal * a[:, None] + b[:, None])
    return dv, normal, a, rstd


@triton.jit
def backward_once_kernel(
    dy,
    x,
    weight,
    bias,
    scale,
    shift,
    add,
    mean_in,
    rstd_in,
    dx,
    sums,  # (3, N, C): Σ dv, Σ dv·x̂, Σ dx
    plane,  # N·C
    scale_stride,
    shift_stride,
    add_stride,
    channels,
    positions,
    slabs,
    ADD: tl.constexpr,
    SILU: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CB: tl.constexpr,
    SB: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // slabs).to(tl.int64)
    slab = program % slabs
    channel, inside, start, offsets, mask = place(
        sample, slab, slab * 0, channels, positions,
        GROUP, WIDTH, 1, CHANNELS_LAST, WIDE, CB, SB,
    )  # fmt: skip
    dv, normal, a, rstd = gradient_tile(
        dy, x, weight, bias, scale, shift, add, mean_in, rstd_in,
        scale_stride, shift_stride, add_stride, sample, channel, inside, start, offsets, mask,
        channels, ADD, SILU, GROUP, CB,
    )  # fmt: skip
    sum_dv = tl.sum(dv, 1)
    sum_dv_normal = tl.sum(dv * normal, 1)
    sum_normal = tl.sum(normal, 1)
    count = 1.0 * GROUP * positions  # a float before it can overflow
    c1 = over_group(a * sum_dv, GROUP, WIDTH, CB) / count
    c2 = over_group(a * sum_dv_normal, GROUP, WIDTH, CB) / count

    grad = rstd[:, None] * (a[:, None] * dv - c1[:, None] - normal * c2[:, None])
    tl.store(dx + start + offsets, grad.to(dx.dtype.element_ty), mask=mask)
    at = sums + sample * channels + channel
    sum_dx = rstd * (a * sum_dv - positions * c1 - c2 * sum_normal)
    tl.store(at, sum_dv, mask=inside)
    tl.store(at + plane, sum_dv_normal, mask=inside)
    tl.store(at + plane + plane, sum_dx, mask=inside)


@triton.jit
def gradient_sums_kernel(
    dy,
    x,
    weight,
    bias,
    scale,
    shift,
    add,
    mean_in,
    rstd_in,
    partial,  # (3, N, C, chunks): Σ dv, Σ dv·x̂, Σ x̂
    plane,  # N·C·chunks
    scale_stride,
    shift_stride,
    add_stride,
    channels,
    positions,
    slabs,
    chunks,
    ADD: tl.constexpr,
    SILU: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CB: tl.constexpr,
    SB: tl.constexpr,
):
    program = tl.program_id(0)
    chunk = program % chunks
    slab = (program // chunks) % slabs
    sample = (program // chunks // slabs).to(tl.int64)
    channel, inside, start, offsets, mask = place(
        sample, slab, chunk, channels, positions,
        GROUP, WIDTH, PARTS, CHANNELS_LAST, WIDE, CB, SB,
    )  # fmt: skip
    dv, normal, a, rstd = gradient_tile(
        dy, x, weight, bias, scale, shift, add, mean_in, rstd_in,
        scale_stride, shift_stride, add_stride, sample, channel, inside, start, offsets, mask,
        channels, ADD, SILU, GROUP, CB,
    )  # fmt: skip
    at = partial + (sample * channels + channel) * chunks + chunk
    tl.store(at, tl.sum(dv, 1), mask=inside)
    tl.store(at + plane, tl.sum(dv * normal, 1), mask=inside)
    tl.store(at + plane + plane, tl.sum(normal, 1), mask=inside)


@triton.jit
def gradient_merge_kernel(
    partial,
    weight,
    scale,
    scale_stride,
    sums,
    constants,  # (2, N, G): c1, c2
    partial_plane,
    sums_plane,
    constants_plane,
    channels,
    positions,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    CB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per group: its channels' sums in the order of the chunks, then c1 and c2.

    The third plane of ``sums`` takes Σ x̂, which backward_apply_kernel turns into Σ dx.
    """
    row = tl.program_id(0).to(tl.int64)
    groups = channels // GROUP
    sample = row // groups
    group = row % groups
    c1 = 0.0
    c2 = 0.0
    for first in range(0, GROUP, CB):
        lane = first + tl.arange(0, CB)
        inside = lane < GROUP
        channel = group * GROUP + lane
        a, _ = coefficients(
            weight, None, scale, None, scale_stride, 0, sample, channel, inside, CB
        )
        at = sample * channels + channel
        sum0 = tl.zeros((CB,), tl.float32)
        sum1 = tl.zeros((CB,), tl.float32)
        sum2 = tl.zeros((CB,), tl.float32)
        for start in range(0, CHUNKS, BLOCK):
            i = start + tl.arange(0, BLOCK)
            mask = inside[:, None] & (i < CHUNKS)[None, :]
            entry = partial + at[:, None] * CHUNKS + i[None, :]
            sum0 += tl.sum(tl.load(entry, mask=mask, other=0.0), 1)
            sum1 += tl.sum(tl.load(entry + partial_plane, mask=mask, other=0.0), 1)
            sum2 += tl.sum(tl.load(entry + partial_plane + partial_plane, mask=mask, other=0.0), 1)
        tl.store(sums + at, sum0, mask=inside)
        tl.store(sums + sums_plane + at, sum1, mask=inside)
        tl.store(sums + sums_plane + sums_plane + at, sum2, mask=inside)
        c1 += tl.sum(tl.where(inside, a * sum0, 0.0), 0)
        c2 += tl.sum(tl.where(inside, a * sum1, 0.0), 0)
    count = 1.0 * GROUP * positions  # a float before it can overflow
    tl.store(constants + row, c1 / count)
    tl.store(constants + constants_plane + row, c2 / count)


@triton.jit
def backward_apply_kernel(
    dy,
    x,
    weight,
    bias,
    scale,
    shift,
    add,
    mean_in,
    rstd_in,
    dx,
    sums,
    constants,
    sums_plane,
    constants_plane,
    scale_stride,
    shift_stride,
    add_stride,
    channels,
    positions,
    slabs,
    chunks,
    ADD: tl.constexpr,
    SILU: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CB: tl.constexpr,
    SB: tl.constexpr,
):
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards, as in the forward
    chunk = program % chunks
    slab = (program // chunks) % slabs
    sample = (program // chunks // slabs).to(tl.int64)
    channel, inside, start, offsets, mask = place(
        sample, slab, chunk, channels, positions,
        GROUP, WIDTH, PARTS, CHANNELS_LAST, WIDE, CB, SB,
    )  # fmt: skip
    dv, normal, a, rstd = gradient_tile(
        dy, x, weight, bias, scale, shift, add, mean_in, rstd_in,
        scale_stride, shift_stride, add_stride, sample, channel, inside, start, offsets, mask,
        channels, ADD, SILU, GROUP, CB,
    )  # fmt: skip
    groups = channels // GROUP
    at = sample * groups + channel // GROUP
    c1 = tl.load(constants + at, mask=inside, other=0.0)
    c2 = tl.load(constants + constants_plane + at, mask=inside, other=0.0)
    grad = rstd[:, None] * (a[:, None] * dv - c1[:, None] - normal * c2[:, None])
    tl.store(dx + start + offsets, grad.to(dx.dtype.element_ty), mask=mask)
    if chunk == 0:
        entry = sums + sample * channels + channel
        sum_dv = tl.load(entry, mask=inside, other=0.0)
        to = entry + sums_plane + sums_plane
        sum_normal = tl.load(to, mask=inside, other=0.0)
        tl.store(to, rstd * (a * sum_dv - positions * c1 - c2 * sum_normal), mask=inside)


# --- Launchers -------------------------------------------------------------------------------


class _Call(NamedTuple):
    """What both directions derive from their arguments."""

    tiles: Plan
    samples: int
    channels: int
    positions: int
    group: int
    add: int
    strides: tuple[int, int, int]  # rows of scale, shift and add
    constants: dict  # shared by every kernel that places tiles
    options: dict


def _prepare(x: Tensor, groups: int, scale, shift, add, backward: bool) -> _Call:
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    channels_last = not x.is_contiguous()
    tiles = plan(
        samples,
        channels,
        groups,
        positions,
        x.element_size(),
        channels_last,
        backward,
        _device(x.device),
    )
    strides = tuple(t.stride(0) if t is not None else 0 for t in (scale, shift, add))
    if add is None:
        kind = NO_ADD
    else:
        kind = ADD_PER_CHANNEL if add.dim() == 2 and x.dim() > 2 else ADD_PER_ELEMENT
    reach = max(tiles.tile_channels * positions, tiles.tile_positions * channels)
    constants = dict(
        GROUP=channels // groups,
        WIDTH=tiles.width,
        CHANNELS_LAST=channels_last,
        WIDE=reach >= 2**31,
        CB=tiles.tile_channels,
        SB=tiles.tile_positions,
    )
    options = dict(num_warps=tiles.warps, num_stages=1, enable_fp_fusion=True)
    group = channels // groups
    return _Call(
        tiles, samples, channels, positions, group, kind, strides, constants, options
    )


@functools.lru_cache(maxsize=None)
def _device(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device()
    return Device(torch.cuda.get_device_properties(device).multi_processor_count)


def forward(
    x: Tensor,  # (N, C, *spatial), contiguous or channels_last
    num_groups: int,
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,  # (N, C), inner stride 1
    shift: Tensor | None,
    add: Tensor | None,  # (N, C) with inner stride 1, or like x
    silu: bool,
    y: Tensor,  # like x
    mean: Tensor,  # float32 (N, num_groups)
    rstd: Tensor,
) -> None:
    """Fill ``y``, ``mean`` and ``rstd``."""
    if x.numel() == 0:
        mean.zero_()
        rstd.zero_()
        return
    call = _prepare(x, num_groups, scale, shift, add, backward=False)
    tiles, samples, channels, positions = call[:4]
    slabs = triton.cdiv(channels, tiles.width) if tiles.parts == 1 else num_groups * tiles.parts
    shared = dict(ADD=call.add, **call.constants)
    if tiles.read_once:
        forward_once_kernel[(samples * slabs,)](
            x, weight, bias, scale, shift, add, y, mean, rstd, *call.strides,
            channels, positions, slabs, eps, SILU=silu, **shared, **call.options,
        )  # fmt: skip
        return
    total = tiles.parts * tiles.chunks
    grid = (samples * slabs * tiles.chunks,)
    partial = torch.empty((2, samples, num_groups, total), dtype=torch.float32, device=x.device)
    moments_kernel[grid](
        x, add, partial, partial.stride(0), call.strides[2], channels, positions, slabs, tiles.chunks,
        PARTS=tiles.parts, **shared, **call.options,
    )  # fmt: skip
    merge_kernel[(samples * num_groups,)](
        partial, partial.stride(0), mean, rstd, positions, tiles.chunks, eps,
        GROUP=call.group, WIDTH=tiles.width, PARTS=tiles.parts, SB=tiles.tile_positions,
        TOTAL=total, BLOCK=min(1024, triton.next_power_of_2(total)),
        num_warps=1 if total <= 128 else 4, enable_fp_fusion=True,
    )  # fmt: skip
    forward_apply_kernel[grid](
        x, weight, bias, scale, shift, add, y, mean, rstd, *call.strides,
        channels, positions, slabs, tiles.chunks, SILU=silu, PARTS=tiles.parts,
        **shared, **call.options,
    )  # fmt: skip


def backward(
    dy: Tensor,  # like x
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    silu: bool,
    dx: Tensor,  # like x
    sums: Tensor,  # float32 (3, N, C)
) -> None:
    """Fill ``dx`` and ``sums`` = Σ dv, Σ dv·x̂ and Σ dx over the positions.

    v is what the activation is applied to, dv its gradient, x̂ the normalised x + add.
    Wu & He 2018 with dv·A as the gradient of x̂: dx = rstd·(A·dv − c1 − x̂·c2).
    """
    if x.numel() == 0:
        sums.zero_()
        return
    call = _prepare(x, num_groups, scale, shift, add, backward=True)
    tiles, samples, channels, positions = call[:4]
    slabs = triton.cdiv(channels, tiles.width) if tiles.parts == 1 else num_groups * tiles.parts
    shared = dict(ADD=call.add, SILU=silu, **call.constants)
    if tiles.read_once:
        backward_once_kernel[(samples * slabs,)](
            dy, x, weight, bias, scale, shift, add, mean, rstd, dx, sums, sums.stride(0),
            *call.strides, channels, positions, slabs, **shared, **call.options,
        )  # fmt: skip
        return
    grid = (samples * slabs * tiles.chunks,)
    floats = dict(dtype=torch.float32, device=x.device)
    partial = torch.empty((3, samples, channels, tiles.chunks), **floats)
    constants = torch.empty((2, samples, num_groups), **floats)
    gradient_sums_kernel[grid](
        dy, x, weight, bias, scale, shift, add, mean, rstd, partial, partial.stride(0),
        *call.strides, channels, positions, slabs, tiles.chunks, PARTS=tiles.parts,
        **shared, **call.options,
    )  # fmt: skip
    block = min(64, triton.next_power_of_2(tiles.chunks))
    gradient_merge_kernel[(samples * num_groups,)](
        partial, weight, scale, call.strides[0], sums, constants,
        partial.stride(0), sums.stride(0), constants.stride(0), channels, positions,
        GROUP=call.group, CHUNKS=tiles.chunks,
        CB=min(triton.next_power_of_2(call.group), max(1, 2048 // block)), BLOCK=block,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    backward_apply_kernel[grid](
        dy, x, weight, bias, scale, shift, add, mean, rstd, dx, sums, constants,
        sums.stride(0), constants.stride(0), *call.strides, channels, positions, slabs, tiles.chunks, PARTS=tiles.parts,
        **shared, **call.options,
    )  # fmt: skip

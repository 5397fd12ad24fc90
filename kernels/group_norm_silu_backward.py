"""The backward of group_norm_silu: v and its gradient are recomputed from x, mean and rstd.

    dx = rstd·(A·dv − c1 − x̂·c2),  A = weight·(1 + scale),  dv = dy·act′(v)
    c1 = Σ_group A·dv / M,  c2 = Σ_group A·dv·x̂ / M

Layouts, range and the two ways through memory: see group_norm_silu.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .group_norm_finish import finish_for
from .group_norm_tiles import (
    UNSPECIALIZED,
    Cut,
    coefficients,
    normalised,
    over_group,
    place,
    prepare,
    read,
    split_program,
    through_silu,
)
from .launcher import Launch

Tensor = torch.Tensor


@triton.jit
def gradient_tile(
    dy,
    x,
    weight,
    bias,
    scale,
    shift,
    film,
    scale_stride,
    shift_stride,
    add,
    add_stride,
    mean_in,
    rstd_in,
    silu,
    sample,
    channel,
    row,
    inside,
    start,
    offsets,
    mask,
    ADD: tl.constexpr,
    CB: tl.constexpr,
):
    """dv and x̂ (CB, SB), zero outside; A and rstd (CB,)."""
    v = read(x, add, add_stride, sample, channel, inside, start, offsets, mask, ADD)
    dv = tl.load(dy + start + offsets, mask=mask, other=0.0).to(tl.float32)
    a, b = coefficients(
        weight, bias, scale, shift, film, scale_stride, shift_stride, sample, channel, inside, CB
    )
    mean = tl.load(mean_in + row)
    rstd = tl.load(rstd_in + row)
    normal = tl.where(mask, (v - mean[:, None]) * rstd[:, None], 0.0)
    if silu:
        dv = through_silu(dv, normal * a[:, None] + b[:, None])
    return dv, normal, a, rstd


@triton.jit(do_not_specialize=UNSPECIALIZED)
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
    film,
    scale_stride,
    shift_stride,
    add_stride,
    plane,  # N·C
    channels,
    positions,
    group,
    width,
    slabs,
    silu,
    ADD: tl.constexpr,
    EXACT: tl.constexpr,
    WIDTH: tl.constexpr,  # or 0
    SPAN: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CB: tl.constexpr,
    SB: tl.constexpr,
):
    if EXACT:
        positions = SB  # a constant: no mask, and offsets that take no registers
    if WIDTH:
        width = WIDTH
    else:
        width *= ALIGN
    sample, slab, chunk = split_program(tl.program_id(0), slabs, 1)
    channel, row, inside, start, offsets, mask = place(
        sample, slab, chunk, channels, positions, group, width, 1,
        SPAN, False, CHANNELS_LAST, WIDE, CB, SB,
    )  # fmt: skip
    dv, normal, a, rstd = gradient_tile(
        dy, x, weight, bias, scale, shift, film, scale_stride, shift_stride, add, add_stride,
        mean_in, rstd_in, silu, sample, channel, row, inside, start, offsets, mask, ADD, CB,
    )  # fmt: skip
    sum_dv = tl.sum(dv, 1)
    sum_dv_normal = tl.sum(dv * normal, 1)
    sum_normal = tl.sum(normal, 1)
    count = 1.0 * group * positions  # a float before it can overflow
    c1 = over_group(a * sum_dv, group, SPAN, CB) / count
    c2 = over_group(a * sum_dv_normal, group, SPAN, CB) / count

    grad = rstd[:, None] * (a[:, None] * dv - c1[:, None] - normal * c2[:, None])
    tl.store(dx + start + offsets, grad.to(dx.dtype.element_ty), mask=mask)
    at = sums + sample * channels + channel
    sum_dx = rstd * (a * sum_dv - positions * c1 - c2 * sum_normal)
    tl.store(at, sum_dv, mask=inside)
    tl.store(at + plane, sum_dv_normal, mask=inside)
    tl.store(at + plane + plane, sum_dx, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
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
    film,
    scale_stride,
    shift_stride,
    add_stride,
    plane,  # N·C·chunks
    channels,
    positions,
    group,
    width,
    slabs,
    parts,
    chunks,
    silu,
    ADD: tl.constexpr,
    SPAN: tl.constexpr,
    PARTED: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CB: tl.constexpr,
    SB: tl.constexpr,
):
    sample, slab, chunk = split_program(tl.program_id(0), slabs, chunks)
    width *= ALIGN
    channel, row, inside, start, offsets, mask = place(
        sample, slab, chunk, channels, positions, group, width, parts,
        SPAN, PARTED, CHANNELS_LAST, WIDE, CB, SB,
    )  # fmt: skip
    dv, normal, a, rstd = gradient_tile(
        dy, x, weight, bias, scale, shift, film, scale_stride, shift_stride, add, add_stride,
        mean_in, rstd_in, silu, sample, channel, row, inside, start, offsets, mask, ADD, CB,
    )  # fmt: skip
    at = partial + (sample * channels + channel) * chunks + chunk
    tl.store(at, tl.sum(dv, 1), mask=inside)
    tl.store(at + plane, tl.sum(dv * normal, 1), mask=inside)
    tl.store(at + plane + plane, tl.sum(normal, 1), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradient_merge_kernel(
    partial,
    weight,
    scale,
    sums,
    constants,  # (2, N, G): c1, c2
    film,
    scale_stride,
    partial_plane,
    sums_plane,
    constants_plane,
    channels,
    positions,
    group,
    chunks,
    CB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per group: its channels' sums in the order of the chunks, then c1 and c2.

    The third plane of ``sums`` takes Σ x̂, which backward_apply_kernel turns into Σ dx.
    """
    row = tl.program_id(0).to(tl.int64)
    groups = channels // group
    sample = row // groups
    origin = (row % groups) * group
    c1 = 0.0
    c2 = 0.0
    for first in range(0, group, CB):
        lane = first + tl.arange(0, CB)
        inside = lane < group
        channel = origin + lane
        a, _ = coefficients(
            weight, None, scale, None, film, scale_stride, 0, sample, channel, inside, CB
        )
        at = sample * channels + channel
        # Lanes add up first: and Triton 3.6 fails on a loop that adds what tl.sum returns.
        lanes0 = tl.zeros((CB, BLOCK), tl.float32)
        lanes1 = tl.zeros((CB, BLOCK), tl.float32)
        lanes2 = tl.zeros((CB, BLOCK), tl.float32)
        for start in range(0, chunks, BLOCK):
            i = start + tl.arange(0, BLOCK)
            mask = inside[:, None] & (i < chunks)[None, :]
            entry = partial + at[:, None] * chunks + i[None, :]
            lanes0 += tl.load(entry, mask=mask, other=0.0)
            lanes1 += tl.load(entry + partial_plane, mask=mask, other=0.0)
            lanes2 += tl.load(entry + partial_plane + partial_plane, mask=mask, other=0.0)
        sum0 = tl.sum(lanes0, 1)
        sum1 = tl.sum(lanes1, 1)
        sum2 = tl.sum(lanes2, 1)
        tl.store(sums + at, sum0, mask=inside)
        tl.store(sums + sums_plane + at, sum1, mask=inside)
        tl.store(sums + sums_plane + sums_plane + at, sum2, mask=inside)
        c1 += tl.sum(tl.where(inside, a * sum0, 0.0), 0)
        c2 += tl.sum(tl.where(inside, a * sum1, 0.0), 0)
    count = 1.0 * group * positions  # a float before it can overflow
    tl.store(constants + row, c1 / count)
    tl.store(constants + constants_plane + row, c2 / count)


@triton.jit(do_not_specialize=UNSPECIALIZED)
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
    film,
    scale_stride,
    shift_stride,
    add_stride,
    sums_plane,
    constants_plane,
    channels,
    positions,
    group,
    width,
    slabs,
    parts,
    chunks,
    silu,
    ADD: tl.constexpr,
    SPAN: tl.constexpr,
    PARTED: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CB: tl.constexpr,
    SB: tl.constexpr,
):
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards, as in the forward
    sample, slab, chunk = split_program(program, slabs, chunks)
    width *= ALIGN
    channel, row, inside, start, offsets, mask = place(
        sample, slab, chunk, channels, positions, group, width, parts,
        SPAN, PARTED, CHANNELS_LAST, WIDE, CB, SB,
    )  # fmt: skip
    dv, normal, a, rstd = gradient_tile(
        dy, x, weight, bias, scale, shift, film, scale_stride, shift_stride, add, add_stride,
        mean_in, rstd_in, silu, sample, channel, row, inside, start, offsets, mask, ADD, CB,
    )  # fmt: skip
    c1 = tl.load(constants + row)
    c2 = tl.load(constants + constants_plane + row)
    grad = rstd[:, None] * (a[:, None] * dv - c1[:, None] - normal * c2[:, None])
    tl.store(dx + start + offsets, grad.to(dx.dtype.element_ty), mask=mask)
    if chunk == 0:
        entry = sums + sample * channels + channel
        sum_dv = tl.load(entry, mask=inside, other=0.0)
        to = entry + sums_plane + sums_plane
        sum_normal = tl.load(to, mask=inside, other=0.0)
        tl.store(to, rstd * (a * sum_dv - positions * c1 - c2 * sum_normal), mask=inside)


def backward(
    x: Tensor,
    num_groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    silu: bool,
) -> Callable[..., None]:
    """What serves calls with tensors like these: it takes dy, like x, x, weight, bias, scale,
    shift, add, the forward's statistics, and fills dx, like x, and what is wanted of the small
    gradients: dweight, dbias (C,), dscale, dshift, dadd (N, C), dense.

    v is what the activation is applied to, dv its gradient, x̂ the normalised x + add.
    Wu & He 2018 with dv·A as the gradient of x̂: dx = rstd·(A·dv − c1 − x̂·c2).
    """
    cut = prepare(x, num_groups, scale, shift, add, backward=True)
    fill = _backward_once(cut, silu) if cut.tiles.read_once else _backward_in_chunks(cut, silu)
    finish = finish_for(cut.samples, cut.channels)
    scale_stride = cut.strides[1]

    def launch(dy, x, weight, bias, scale, shift, add, statistics, dx, *small):
        sums = statistics.new_empty((3, cut.samples, cut.channels))
        operands = (dy, *normalised(x, weight, bias, scale, shift, add), *statistics.unbind())
        fill(operands, weight, scale, dx, sums)
        if any(gradient is not None for gradient in small):
            finish(sums, sums.stride(0), weight, bias, scale, scale_stride, *small)

    return launch


def _backward_once(cut: Cut, silu: bool) -> Callable[..., None]:
    grid, plane = (cut.samples * cut.slabs,), cut.samples * cut.channels
    numbers = (*cut.strides, plane, *cut.sizes, silu)
    launch = Launch(backward_once_kernel, grid, *numbers, **cut.exact, **cut.constants)
    return lambda operands, weight, scale, dx, sums: launch(*operands, dx, sums)


def _backward_in_chunks(cut: Cut, silu: bool) -> Callable[..., None]:
    tiles, rows = cut.tiles, cut.samples * (cut.channels // cut.group)
    grid = (cut.samples * cut.slabs * tiles.chunks,)
    sizes = (*cut.sizes, tiles.parts, tiles.chunks, silu)
    sums_plane = cut.samples * cut.channels
    planes = (sums_plane * tiles.chunks, sums_plane, rows)
    parted = tiles.parts > 1
    how = dict(PARTED=parted, **cut.constants)
    add_up = Launch(gradient_sums_kernel, grid, *cut.strides, planes[0], *sizes, **how)
    merge = Launch(
        gradient_merge_kernel, (rows,),
        *cut.strides[:2], *planes, cut.channels, cut.positions, cut.group, tiles.chunks,
        CB=32, BLOCK=32, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    apply = Launch(backward_apply_kernel, grid, *cut.strides, *planes[1:], *sizes, **how)

    def launch(operands, weight, scale, dx, sums):
        partial, constants = sums.new_empty((3, planes[0])), sums.new_empty((2, rows))
        add_up(*operands, partial)
        stand_in = operands[1] if scale is None else scale
        merge(partial, weight, stand_in, sums, constants)
        apply(*operands, dx, sums, constants)

    return launch

"""The backward of group_norm_silu: v and its gradient are recomputed from x, mean and rstd.

    dx = rstd·(A·dv − c1 − x̂·c2),  A = weight·(1 + scale),  dv = dy·act′(v)
    c1 = Σ_group A·dv / M,  c2 = Σ_group A·dv·x̂ / M

Layouts, range and the two ways through memory: see group_norm_silu.
"""

import torch
import triton
import triton.language as tl

from .group_norm_tiles import (
    coefficients,
    over_group,
    place,
    prepare,
    read,
    split_program,
    through_silu,
)
from .launcher import launch_of

Tensor = torch.Tensor


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
    EXACT: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CB: tl.constexpr,
    SB: tl.constexpr,
):
    if EXACT:
        positions = SB  # a constant: no mask, and offsets that take no registers
    sample, slab, chunk = split_program(tl.program_id(0), slabs, 1)
    channel, inside, start, offsets, mask = place(
        sample, slab, chunk, channels, positions,
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
    sample, slab, chunk = split_program(tl.program_id(0), slabs, chunks)
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
        a, _ = coefficients(weight, None, scale, None, scale_stride, 0, sample, channel, inside, CB)
        at = sample * channels + channel
        # Lanes add up first: and Triton 3.6 fails on a loop that adds what tl.sum returns.
        lanes0 = tl.zeros((CB, BLOCK), tl.float32)
        lanes1 = tl.zeros((CB, BLOCK), tl.float32)
        lanes2 = tl.zeros((CB, BLOCK), tl.float32)
        for start in range(0, CHUNKS, BLOCK):
            i = start + tl.arange(0, BLOCK)
            mask = inside[:, None] & (i < CHUNKS)[None, :]
            entry = partial + at[:, None] * CHUNKS + i[None, :]
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
    sample, slab, chunk = split_program(program, slabs, chunks)
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
    call = prepare(x, num_groups, scale, shift, add, backward=True)
    tiles, samples, channels, positions, slabs = call[:5]
    shared = dict(SILU=silu, **call.constants)
    if tiles.read_once:
        launch = launch_of(
            backward_once_kernel, (samples * slabs,), sums.stride(0), *call.strides,
            channels, positions, slabs, EXACT=positions == tiles.tile_positions, **shared,
        )  # fmt: skip
        launch(dy, x, weight, bias, scale, shift, add, mean, rstd, dx, sums)
        return
    grid = (samples * slabs * tiles.chunks,)
    partial = sums.new_empty((3, samples, channels, tiles.chunks))
    constants = sums.new_empty((2, samples, num_groups))
    launch = launch_of(
        gradient_sums_kernel, grid, partial.stride(0), *call.strides,
        channels, positions, slabs, tiles.chunks, PARTS=tiles.parts, **shared,
    )  # fmt: skip
    launch(dy, x, weight, bias, scale, shift, add, mean, rstd, partial)
    block = min(64, triton.next_power_of_2(tiles.chunks))
    launch = launch_of(
        gradient_merge_kernel, (samples * num_groups,),
        partial.stride(0), sums.stride(0), constants.stride(0), channels, positions,
        GROUP=channels // num_groups, CHUNKS=tiles.chunks,
        CB=min(triton.next_power_of_2(channels // num_groups), max(1, 2048 // block)), BLOCK=block,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    launch(partial, weight, scale, call.strides[0], sums, constants)
    launch = launch_of(
        backward_apply_kernel, grid, sums.stride(0), constants.stride(0), *call.strides,
        channels, positions, slabs, tiles.chunks, PARTS=tiles.parts, **shared,
    )  # fmt: skip
    launch(dy, x, weight, bias, scale, shift, add, mean, rstd, dx, sums, constants)

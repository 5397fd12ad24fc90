"""rms_norm_silu: RMS norm over the channels, FiLM and SiLU, in Triton.

    y = act(x / max(‖x‖, eps)·√C·weight·(1 + scale) + shift)    ‖x‖ over each position's channels

Layouts: x (N, C, *spatial) contiguous or channels_last; float32, bfloat16, float16; weight and FiLM
in any of them. Arithmetic is float32.
Bytes moved, with B the bytes of x: 2B where a position's channels fit one program's registers, else
3B, of which the last B comes from the L2 as far as it holds it.
Floor for (8, 256, 32, 32) bfloat16: 2.0 µs at 4.3 TB/s (H200).

A program takes neighbouring positions of one sample, as a tile (channels) × (positions), or as
several such one after the other. Range: any C, 64-bit offsets.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .group_norm_tiles import apply_silu, coefficients
from .launcher import Launch

Tensor = torch.Tensor
MOST = 16384  # elements of a tile of all channels: 32 values a thread in 16 warps
USUAL = 4096  # a tile that leaves room for several programs on a multiprocessor
LEAST_BLOCKS = 8  # of one sample, of which then 17 fill 132 multiprocessors
LINE, SECTOR = 128, 32  # bytes side by side: what a warp should cover, and memory's least


class Plan(NamedTuple):
    """Tiles of one layer: see ``choose_tiles``."""

    tile_channels: int  # a power of two; all channels where they fit
    tile_positions: int
    warps: int


@functools.cache
def choose_tiles(channels: int, positions: int, itemsize: int, channels_last: bool) -> Plan:
    """The tiles for one layer: a pure function of its shape, layout and storage size, not of the
    batch, for which it would be compiled anew."""
    padded_positions = triton.next_power_of_2(positions)
    tile_channels = triton.next_power_of_2(channels)
    least = 1 if channels_last else LINE // itemsize
    tile_positions = min(least, padded_positions)
    while tile_channels * tile_positions > MOST and tile_positions * itemsize > SECTOR:
        tile_positions //= 2
    if tile_channels * tile_positions > MOST:
        tile_positions = min(least, padded_positions)
        tile_channels = USUAL // tile_positions
    while (
        2 * tile_channels * tile_positions <= USUAL
        and tile_positions < padded_positions
        and triton.cdiv(positions, 2 * tile_positions) >= LEAST_BLOCKS
    ):
        tile_positions *= 2
    warps = min(16, max(1, tile_channels * tile_positions // 1024))
    return Plan(tile_channels, tile_positions, warps)


@triton.jit(do_not_specialize=["blocks"])
def rms_norm_silu_kernel(
    x,
    weight,
    scale,
    shift,
    y,
    scale_stride,
    shift_stride,
    channels,
    positions,
    blocks,
    eps,
    root,  # √channels
    SILU: tl.constexpr,
    ONCE: tl.constexpr,  # one tile holds all channels
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,  # offsets within a program's tiles need 64 bits
    CB: tl.constexpr,
    SB: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    first = (program % blocks) * SB
    start = sample * channels * positions
    if CHANNELS_LAST:
        start += first.to(tl.int64) * channels
    else:
        start += first
    step = tl.arange(0, SB)
    inside = first + step < positions
    if ONCE:
        offsets, mask, channel, real = tile(
            0, step, inside, channels, positions, CHANNELS_LAST, WIDE, CB
        )
        v = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32)
        v *= inverse_norm(tl.sum(v * v, 0), eps, root)[None, :]
        a, b = coefficients(
            weight, None, scale, shift, True, scale_stride, shift_stride, sample, channel, real, CB
        )
        v = v * a[:, None] + b[:, None]
        if SILU:
            v = apply_silu(v)
        tl.store(y + start + offsets, v.to(y.dtype.element_ty), mask=mask)
    else:
        squares = tl.zeros((CB, SB), tl.float32)
        for c in range(0, channels, CB):
            offsets, mask, channel, real = tile(
                c, step, inside, channels, positions, CHANNELS_LAST, WIDE, CB
            )
            v = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32)
            squares += v * v
        inverse = inverse_norm(tl.sum(squares, 0), eps, root)
        for c in range(0, channels, CB):
            offsets, mask, channel, real = tile(
                c, step, inside, channels, positions, CHANNELS_LAST, WIDE, CB
            )
            v = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32)
            a, b = coefficients(
                weight,
                None,
                scale,
                shift,
                True,
                scale_stride,
                shift_stride,
                sample,
                channel,
                real,
                CB,
            )
            v = v * inverse[None, :] * a[:, None] + b[:, None]
            if SILU:
                v = apply_silu(v)
            tl.store(y + start + offsets, v.to(y.dtype.element_ty), mask=mask)


@triton.jit
def tile(
    first,
    step,
    inside,
    channels,
    positions,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CB: tl.constexpr,
):
    """Offsets and mask (CB, SB) of the channels from ``first`` on, these and which exist (CB,)."""
    channel = first + tl.arange(0, CB)
    real = channel < channels
    row = channel
    if WIDE:
        row = row.to(tl.int64)
        step = step.to(tl.int64)
    if CHANNELS_LAST:
        offsets = step[None, :] * channels + row[:, None]
    else:
        offsets = row[:, None] * positions + step[None, :]
    return offsets, real[:, None] & inside[None, :], channel, real


@triton.jit
def inverse_norm(squares, eps, root):
    """√C / max(‖x‖, eps); NaN for NaN."""
    norm = tl.sqrt_rn(squares)
    return tl.div_rn(root, tl.where(norm < eps, eps, norm))


def forward(
    x: Tensor, eps: float, scale: Tensor | None, shift: Tensor | None, silu: bool
) -> Launch:
    """The launch for tensors like these, channels of scale and shift adjacent. It takes x, weight,
    dense, scale, shift, and fills y; x and y are dense in one layout."""
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    channels_last = not x.is_contiguous()
    tiles = choose_tiles(channels, positions, x.element_size(), channels_last)
    blocks = triton.cdiv(positions, tiles.tile_positions)
    return Launch(
        rms_norm_silu_kernel, (samples * blocks,),
        0 if scale is None else scale.stride(0), 0 if shift is None else shift.stride(0),
        channels, positions, blocks, eps, channels**0.5,
        SILU=silu,
        ONCE=tiles.tile_channels >= channels,
        CHANNELS_LAST=channels_last,
        WIDE=max(channels * positions, tiles.tile_positions * channels) >= 2**31,
        CB=tiles.tile_channels,
        SB=tiles.tile_positions,
        num_warps=tiles.warps,
        num_stages=1,
        enable_fp_fusion=True,
    )  # fmt: skip

"""normal: counter-based Gaussian noise, the Triton fill.

Layouts: samples of (channels, spatial) with any strides; float32, bfloat16, float16.
Bytes moved: the output, once; floor for (64, 3, 256, 256) float32: 11.7 µs at 4.3 TB/s (H200), in
which 31 instructions an element are done, 15.5 in the halves. The kernel has 23.

One program draws BLOCK counters of one sample, interleaves the four lanes and stores 4·BLOCK
neighbouring elements. Range: element indices below 2^34.
"""

import functools

import torch
import triton
import triton.language as tl

from fastdiff.ops.counters import signed

from .elementwise import (
    BLOCK,
    WARPS,
    block_of_program,
    counted,
    draw,
    elements_from,
    is_wide,
    place,
)
from .launcher import LARGEST_CACHE, Launch
from .philox import high_word, low_word, philox_words

# An integer argument equal to 1 would otherwise become a constant without a type.
UNSPECIALIZED = ["seed", "step", "first_sample", "channels", "spatial"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def normal_kernel(
    out,
    step,  # a counter, like the two that follow; its low 32 bits count
    seed,
    first_sample,
    channels,
    spatial,
    sample_stride,
    channel_stride,
    spatial_stride,
    ONE_RUN: tl.constexpr,  # a sample is one contiguous run: no division
    WIDE: tl.constexpr,  # more than 2^31 elements in a sample
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,  # the CPU's to the bit
):
    sample, first_quad, elements = block_of_program(channels, spatial, BLOCK, WIDE)
    element = elements_from(first_quad, BLOCK, WIDE)
    number = counted(first_sample) + sample
    dtype: tl.constexpr = out.dtype.element_ty
    z = draw(counted(seed), counted(step), number, first_quad, BLOCK, dtype, EXACT)
    at = place(element, spatial, channel_stride, spatial_stride, ONE_RUN)
    to = out + sample * sample_stride + at
    tl.store(to, z.to(dtype), mask=element < elements)


@triton.jit(do_not_specialize=["seed", "step", "sample", "first_quad", "quads"])
def philox_kernel(out, quads, seed, step, sample, first_quad, BLOCK: tl.constexpr):
    """The integers alone, for checking: out is int32 (quads, 4), the words' bits."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seed = seed.to(tl.int64)
    step = low_word(step.to(tl.int64))
    number = sample.to(tl.int64)
    quad = low_word(first_quad.to(tl.int64) + row)
    r0, r1, r2, r3 = philox_words(
        low_word(seed), high_word(seed), step, low_word(number), high_word(number), quad
    )
    to = out + 4 * row
    tl.store(to + 0, r0.to(tl.int32, bitcast=True), mask=row < quads)
    tl.store(to + 1, r1.to(tl.int32, bitcast=True), mask=row < quads)
    tl.store(to + 2, r2.to(tl.int32, bitcast=True), mask=row < quads)
    tl.store(to + 3, r3.to(tl.int32, bitcast=True), mask=row < quads)


@functools.lru_cache(LARGEST_CACHE)
def launch_for(samples: int, layout: tuple[int, int, int, int, int], exact: bool) -> Launch:
    """The launch for outputs whose samples stand as ``layout`` says (fastdiff.ops.layouts.Layout);
    ``exact``: with the CPU's bits. It fills the output by the counters: step, seed and first
    sample."""
    channels, spatial, _, _, spatial_stride = layout
    blocks = triton.cdiv(channels * spatial, 4 * BLOCK)
    return Launch(
        normal_kernel,
        (samples * blocks,),
        *layout,
        ONE_RUN=channels == 1 and spatial_stride == 1,
        WIDE=is_wide((samples, channels, spatial)),
        BLOCK=BLOCK,
        EXACT=exact,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def philox(out: torch.Tensor, *, seed: int, step: int, sample: int, first_quad: int = 0) -> None:
    """Write the words of counters (first_quad + i, step, sample) into ``out``: int32 (quads, 4)."""
    quads = out.shape[0]
    grid = (triton.cdiv(quads, BLOCK),)
    numbers = signed(seed, 64), signed(step, 32), signed(sample, 64), signed(first_quad, 32)
    Launch(philox_kernel, grid, BLOCK=BLOCK)(out, quads, *numbers)

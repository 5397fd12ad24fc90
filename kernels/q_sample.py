"""q_sample: x_t = signal[t]·x_start + sigma[t]·noise, the noise given or drawn.

Layouts: samples of (channels, spatial) with any strides, each operand its own; float32, bfloat16,
float16, arithmetic float32. Bytes moved with drawn noise: x_start and x_t; floor for
(64, 3, 256, 256) float32: 23.4 µs at 4.3 TB/s (H200), in which 62 instructions an element are done,
31 in the halves. The kernel has 28 and 30, of which the generator's arithmetic is about 20.

One program draws BLOCK counters of one sample and computes 4·BLOCK neighbouring elements.
Range: element indices below 2^34. A t out of range gives NaN.
"""

import triton
import triton.language as tl

from .elementwise import (
    BLOCK,
    WARPS,
    block_of_program,
    counted,
    draw,
    elements_from,
    is_one_run,
    is_wide,
    place,
    widened,
)
from .launcher import Launch

# An integer argument equal to 1 would otherwise become a constant without a type.
UNSPECIALIZED = ["seed", "step", "first_sample", "rows", "channels", "spatial"]
TRAINING_STEP_BASE = tl.constexpr(2**31)  # fastdiff.ops.counters


@triton.jit(do_not_specialize=UNSPECIALIZED)
def q_sample_kernel(
    x_start,
    noise,  # or None: drawn, or none
    t,  # int64, one a sample
    signal,  # float32 (rows,)
    sigma,
    x_t,
    drawn,  # the noise, as x_t lies; or None: not wanted
    step,  # a counter, like the two that follow
    seed,  # or None: none is drawn
    first_sample,
    rows,
    channels,
    spatial,
    x_sample,
    x_channel,
    x_spatial,
    noise_sample,
    noise_channel,
    noise_spatial,
    out_sample,
    out_channel,
    out_spatial,
    DRAWS: tl.constexpr,
    ONE_RUN: tl.constexpr,  # samples are contiguous: no division
    WIDE: tl.constexpr,  # more than 2^31 elements in a sample
    BLOCK: tl.constexpr,
):
    sample, first_quad, elements = block_of_program(channels, spatial, BLOCK, WIDE)
    element = elements_from(first_quad, BLOCK, WIDE)
    inside = element < elements

    row = tl.load(t + sample)
    known = (row >= 0) & (row < rows)
    signal_t = tl.load(signal + row, mask=known, other=float("nan"))
    sigma_t = tl.load(sigma + row, mask=known, other=float("nan"))

    x_at = sample * x_sample + place(element, spatial, x_channel, x_spatial, ONE_RUN)
    value = widened(tl.load(x_start + x_at, mask=inside)) * signal_t
    if DRAWS:
        dtype: tl.constexpr = x_start.dtype.element_ty
        counter_step = counted(step) + TRAINING_STEP_BASE
        number = counted(first_sample) + sample
        z = draw(counted(seed), counter_step, number, first_quad, BLOCK, dtype)
        stored = z.to(dtype)
        if drawn is not None:
            at = place(element, spatial, out_channel, out_spatial, ONE_RUN)
            tl.store(drawn + sample * out_sample + at, stored, mask=inside)
        value = tl.fma(widened(stored), tl.zeros_like(value) + sigma_t, value)
    elif noise is not None:
        at = place(element, spatial, noise_channel, noise_spatial, ONE_RUN)
        z = widened(tl.load(noise + sample * noise_sample + at, mask=inside))
        value = tl.fma(z, tl.zeros_like(value) + sigma_t, value)
    at = place(element, spatial, out_channel, out_spatial, ONE_RUN)
    tl.store(x_t + sample * out_sample + at, value.to(x_t.dtype.element_ty), mask=inside)


def launch_for(
    shape: tuple[int, int, int], rows: int, *layouts: tuple[int, int, int, int], draws: bool
) -> Launch:
    """The launch for operands of ``shape`` and with these ``layouts`` (fastdiff.ops.layouts), of
    x_start, noise and x_t, and tables of so many rows. It takes x_start, noise, t, signal, sigma,
    and fills x_t and drawn, then the counters: training step, seed and first sample."""
    samples, channels, spatial = shape
    blocks = triton.cdiv(channels * spatial, 4 * BLOCK)
    return Launch(
        q_sample_kernel,
        (samples * blocks,),
        rows,
        channels,
        spatial,
        *(stride for layout in layouts for stride in layout[1:]),
        DRAWS=draws,
        ONE_RUN=is_one_run(shape, *layouts),
        WIDE=is_wide(shape),
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )

"""posterior_step: one sampler step from one row of a step table (fastdiff/methods/), one pass.

Layouts: samples of (channels, spatial) with any strides, each operand its own; float32, bfloat16,
float16, arithmetic float32. Bytes moved with drawn noise: x_t, the network's output and x_prev; one
more pass each for a learned variance, guidance, a given noise, every slot of memory that the row
reads or writes, and x_start returned. Floor for (64, 3, 256, 256) float32, three passes: 35.1 µs at
4.3 TB/s (H200).

One program draws BLOCK counters of one sample and computes 4·BLOCK neighbouring elements. The row,
its number, the seed, the first sample's number, the guidance scale and the samples' output scales
are read from the device. Range: element indices below 2^34. A step out of range gives NaN, and
writes no memory.
"""

from collections import namedtuple

import triton
import triton.language as tl

from fastdiff.methods.table import COLUMNS

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

WARPS_KEEPING = 4  # memory's elements and places are more than the registers of WARPS hold
FIRST_COUNTER_STEP = tl.constexpr(1)  # fastdiff.ops.counters.sampling_step(0)
UNSPECIALIZED = ["seed", "step", "first_sample", "guidance", "rows", "channels", "spatial"]


# Where each column of the packed table stands: PLACE.a, PLACE.b, …
PLACE = namedtuple("PLACE", COLUMNS)(*range(len(COLUMNS)))


@triton.jit
def exp(x):
    """e^x by the GPU's exp2, with what x·log2(e) rounds away put back."""
    y = x * 1.4426950216293335  # log2(e) rounded, and what that lacks
    lost = tl.fma(x, tl.zeros_like(x) + 1.4426950216293335, -y) + x * 1.9259629911266175e-08
    lost = tl.where(tl.abs(lost) < 1.0, lost, 0.0)  # not of an infinite, NaN or enormous x
    return tl.exp2(y) * (1.0 + lost * 0.6931471805599453)  # a sum would be inf - inf far out


@triton.jit
def add_term(total, coefficient, value):
    """total + coefficient·value; a zero coefficient adds nothing, whatever the value: NaN too."""
    added = tl.fma(tl.zeros_like(value) + coefficient, value, total)
    return tl.where(coefficient != 0, added, total)


@triton.jit
def add_slot(total, factor, slot, at, inside):
    """total + factor·what a slot of memory holds, which is read where the factor is not zero."""
    if slot is not None:
        wanted = tl.where(factor != 0, inside, False)
        total = add_term(total, factor, widened(tl.load(slot + at, mask=wanted)))
    return total


@triton.jit
def keep_in(slot, at, value, inside, written):
    """``value`` in a slot of memory, if it is the one that is written."""
    if slot is not None:
        tl.store(slot + at, value.to(slot.dtype.element_ty), mask=tl.where(written, inside, False))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def posterior_step_kernel(
    x_t,
    output,
    packed,  # float32 (rows, columns)
    noise,  # or None: drawn, or none
    memory0,  # or None, like the two that follow
    memory1,
    memory2,
    unconditional,  # or None: within `output`, or none
    guidance_address,  # or None: then `guidance` counts
    output_scale,  # float32 (samples,), or None: 1
    x_prev,
    x_start,  # or None: not wanted
    step,  # a counter, like the two that follow
    seed,  # or None: none is drawn
    first_sample,
    guidance,
    rows,
    channels,
    spatial,
    variance_offset,  # of the learned variance within `output`, in elements
    guidance_offset,  # of the unconditional half
    x_sample,
    x_channel,
    x_spatial,
    output_sample,
    output_channel,
    output_spatial,
    unconditional_sample,
    unconditional_channel,
    unconditional_spatial,
    noise_sample,
    noise_channel,
    noise_spatial,
    memory0_sample,
    memory0_channel,
    memory0_spatial,
    memory1_sample,
    memory1_channel,
    memory1_spatial,
    memory2_sample,
    memory2_channel,
    memory2_spatial,
    prev_sample,
    prev_channel,
    prev_spatial,
    start_sample,
    start_channel,
    start_spatial,
    PLACE: tl.constexpr,  # of the columns
    LEARNED: tl.constexpr,
    GUIDED: tl.constexpr,
    DRAWS: tl.constexpr,
    KEEPS: tl.constexpr,  # the row writes memory; else memory is only read
    ONE_RUN: tl.constexpr,
    WIDE: tl.constexpr,  # more than 2^31 elements in a sample
    BLOCK: tl.constexpr,
):
    sample, first_quad, elements = block_of_program(channels, spatial, BLOCK, WIDE)
    element = elements_from(first_quad, BLOCK, WIDE)
    inside = element < elements

    step = counted(step)
    known = (step >= 0) & (step < rows)
    row = packed + step * len(PLACE)
    a = tl.load(row + PLACE.a, mask=known, other=float("nan"))
    b = tl.load(row + PLACE.b, mask=known, other=float("nan"))
    c = tl.load(row + PLACE.c, mask=known, other=float("nan"))
    d = tl.load(row + PLACE.d, mask=known, other=float("nan"))
    o = tl.load(row + PLACE.o, mask=known, other=float("nan"))
    sigma = tl.load(row + PLACE.sigma, mask=known, other=float("nan"))
    clip = tl.load(row + PLACE.clip, mask=known, other=float("nan"))

    at = sample * x_sample + place(element, spatial, x_channel, x_spatial, ONE_RUN)
    x = widened(tl.load(x_t + at, mask=inside))
    at = sample * output_sample + place(element, spatial, output_channel, output_spatial, ONE_RUN)
    said = widened(tl.load(output + at, mask=inside))
    if GUIDED:
        if guidance_address is not None:
            guidance = tl.load(guidance_address)
        if unconditional is not None:
            other_at = sample * unconditional_sample + place(
                element, spatial, unconditional_channel, unconditional_spatial, ONE_RUN
            )
            other = widened(tl.load(unconditional + other_at, mask=inside))
        else:
            other = widened(tl.load(output + guidance_offset + at, mask=inside))
        said = other + guidance * (said - other)
    if output_scale is not None:
        said = tl.load(output_scale + sample) * said

    x0 = tl.fma(tl.zeros_like(x) + b, said, a * x)
    x0 = tl.maximum(x0, -clip, propagate_nan=tl.PropagateNan.ALL)
    x0 = tl.minimum(x0, clip, propagate_nan=tl.PropagateNan.ALL)
    value = add_term(add_term(add_term(tl.zeros_like(x), c, x0), d, x), o, said)
    m0 = place(element, spatial, memory0_channel, memory0_spatial, ONE_RUN)
    m1 = place(element, spatial, memory1_channel, memory1_spatial, ONE_RUN)
    m2 = place(element, spatial, memory2_channel, memory2_spatial, ONE_RUN)
    m0 += sample * memory0_sample
    m1 += sample * memory1_sample
    m2 += sample * memory2_sample
    e0 = tl.load(row + PLACE.e0, mask=known, other=float("nan"))
    e1 = tl.load(row + PLACE.e1, mask=known, other=float("nan"))
    e2 = tl.load(row + PLACE.e2, mask=known, other=float("nan"))
    value = add_slot(value, e0, memory0, m0, inside)
    value = add_slot(value, e1, memory1, m1, inside)
    value = add_slot(value, e2, memory2, m2, inside)
    if DRAWS or noise is not None:
        if DRAWS:
            number = counted(first_sample) + sample
            draw_step = step + FIRST_COUNTER_STEP
            z = draw(counted(seed), draw_step, number, first_quad, BLOCK, output.dtype.element_ty)
        else:
            z_at = place(element, spatial, noise_channel, noise_spatial, ONE_RUN)
            z = widened(tl.load(noise + sample * noise_sample + z_at, mask=inside))
        if LEARNED:
            log_min = tl.load(row + PLACE.log_min, mask=known, other=float("nan"))
            log_max = tl.load(row + PLACE.log_max, mask=known, other=float("nan"))
            f = widened(tl.load(output + variance_offset + at, mask=inside)) * 0.5 + 0.5
            z = exp(0.5 * (f * log_max + (1.0 - f) * log_min)) * z
        value = add_term(value, sigma, z)

    at = place(element, spatial, prev_channel, prev_spatial, ONE_RUN)
    tl.store(x_prev + sample * prev_sample + at, value.to(x_prev.dtype.element_ty), mask=inside)
    if x_start is not None:
        at = place(element, spatial, start_channel, start_spatial, ONE_RUN)
        tl.store(x_start + sample * start_sample + at, x0.to(x_start.dtype.element_ty), mask=inside)
    if KEEPS:
        slot = tl.load(row + PLACE.slot, mask=known, other=-1.0)
        k = tl.load(row + PLACE.k, mask=known, other=0.0)
        q = tl.load(row + PLACE.q, mask=known, other=0.0)
        kept = add_term(add_term(tl.zeros_like(x), k, x0), q, x)
        tl.debug_barrier()  # a store's threads need not be those of the load from the same place
        keep_in(memory0, m0, kept, inside, slot == 0)
        keep_in(memory1, m1, kept, inside, slot == 1)
        keep_in(memory2, m2, kept, inside, slot == 2)


def launch_for(
    shape: tuple[int, int, int],
    rows: int,
    x_t: tuple[int, int, int, int],
    output: tuple[int, int, int, int],
    variance_offset: int,  # of that half of the output; negative: it has none
    guidance_offset: int,  # of the unconditional half; negative: there is none
    *others: tuple[int, int, int, int],
    guided: bool,
    guidance: float,
    draws: bool,
    keeps: bool,
) -> Launch:
    """The launch for operands of ``shape`` with the layouts (fastdiff.ops.layouts) of x_t, output,
    unconditional, noise, the slots of memory, x_prev and x_start, a table of so many rows, and a
    guidance scale where no tensor says it. It takes x_t, output, packed, noise, the memory,
    unconditional, that tensor or None and output_scale, fills x_prev and x_start, and takes the
    counters: the row, seed and first sample. ``keeps``: memory is written, as the row says."""
    layouts = (x_t, output, *others)
    samples, channels, spatial = shape
    blocks = triton.cdiv(channels * spatial, 4 * BLOCK)
    return Launch(
        posterior_step_kernel,
        (samples * blocks,),
        guidance,
        rows,
        channels,
        spatial,
        variance_offset,
        guidance_offset,
        *(stride for layout in layouts for stride in layout[1:]),
        PLACE=PLACE,
        LEARNED=variance_offset >= 0,
        GUIDED=guided,
        DRAWS=draws,
        KEEPS=keeps,
        ONE_RUN=is_one_run(shape, *layouts),
        WIDE=is_wide(shape),
        BLOCK=BLOCK,
        num_warps=WARPS_KEEPING if keeps else WARPS,
        enable_fp_fusion=False,
    )

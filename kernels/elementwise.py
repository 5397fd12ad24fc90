"""What the elementwise kernels share: where an element stands, and the noise of neighbouring ones.

An operand's sample is a (channels, spatial) array whose element (c, s) has index c·spatial + s in
the noise's counter and stands at c·channel_stride + s·spatial_stride.
"""

import triton
import triton.language as tl

from .philox import high_word, interleave4, low_word, philox_normals

BLOCK = 256  # counters a program draws; it computes four elements of each
WARPS = 2  # 16 elements of a thread share addresses and the generator's keys: a fifth of the work


@triton.jit
def block_of_program(channels, spatial, BLOCK: tl.constexpr):
    """(sample, first quad, elements of a sample) of this program: BLOCK counters of one sample."""
    elements = channels.to(tl.int64) * spatial
    blocks = tl.cdiv(elements, 4 * BLOCK).to(tl.uint32)  # as a grid: 64-bit divisions are slow
    program = tl.program_id(0).to(tl.uint32)
    sample = program // blocks
    first_quad = (program - sample * blocks).to(tl.int64) * BLOCK
    return sample.to(tl.int64), first_quad, elements


@triton.jit
def place(element, spatial, channel_stride, spatial_stride, ONE_RUN: tl.constexpr):
    """An element's offset within its sample."""
    if ONE_RUN:
        offset = element
    else:
        channel = element // spatial
        position = element - channel * spatial
        offset = channel.to(tl.int64) * channel_stride + position.to(tl.int64) * spatial_stride
    return offset


@triton.jit
def elements_from(first_quad, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """4·first_quad …, in 32 bits where a sample allows it: 64-bit divisions are slow."""
    element = 4 * first_quad + tl.arange(0, 4 * BLOCK)
    if not WIDE:
        element = element.to(tl.int32)
    return element


@triton.jit
def counted(counter):
    """The int64 of a counter (fastdiff.ops.counters): of a number its bits, or what stands on the
    device at its address."""
    if counter.dtype.is_ptr():
        counter = tl.load(counter)
    return counter.to(tl.int64)


@triton.jit
def draw(seed, step, number, first_quad, BLOCK: tl.constexpr, EXACT: tl.constexpr = False):
    """Float32 noise of elements 4·first_quad … of sample ``number`` at the counter's ``step``, all
    int64, their low bits. EXACT: the CPU's to the bit."""
    quad = low_word(first_quad + tl.arange(0, BLOCK))
    sample_low, sample_high = low_word(number), high_word(number)
    n0, n1, n2, n3 = philox_normals(
        low_word(seed), high_word(seed), low_word(step), sample_low, sample_high, quad, EXACT
    )
    return interleave4(n0, n1, n2, n3)


def is_one_run(shape: tuple[int, int, int], *layouts: tuple[int, int, int, int]) -> bool:
    """Whether each operand's samples are contiguous."""
    return shape[1] == 1 and all(layout[3] == 1 for layout in layouts)


def is_wide(shape: tuple[int, int, int]) -> bool:
    """Whether a sample's elements need 64-bit numbers."""
    return shape[1] * shape[2] >= 2**31 - 4 * BLOCK

"""What the elementwise kernels share: where an element stands, and the noise of neighbouring ones.

An operand's sample is a (channels, spatial) array whose element (c, s) has index c·spatial + s in
the noise's counter and stands at c·channel_stride + s·spatial_stride.
"""

import triton
import triton.language as tl

from .philox import INTERPRETED, high_word, interleave4, low_word, philox_normals

BLOCK = 256  # counters a program draws; it computes four elements of each
WARPS = 2  # 16 elements of a thread share addresses and the generator's keys: a fifth of the work


@triton.jit
def block_of_program(channels, spatial, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """(sample, first quad, elements of a sample) of this program: BLOCK counters of one sample."""
    elements = channels.to(tl.uint64) * spatial
    if not WIDE:
        elements = elements.to(tl.uint32)
    blocks = tl.cdiv(elements, 4 * BLOCK).to(tl.uint32)  # as a grid: 64-bit divisions are slow
    program = tl.program_id(0).to(tl.uint32)
    sample = program // blocks
    first_quad = (program - sample * blocks) * BLOCK
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
    first_quad = first_quad.to(tl.int64 if WIDE else tl.int32)
    return 4 * first_quad + tl.arange(0, 4 * BLOCK)


@triton.jit
def widened(value):
    """``value`` in float32. LLVM takes three instructions for two bfloat16, not two; and numbers
    that were just rounded to bfloat16 it rounds one by one, unless they are asked for in pairs."""
    if value.dtype == tl.bfloat16 and not INTERPRETED:
        halves: tl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        return tl.inline_asm_elementwise(
            halves, "=f,=f,r", [value], dtype=tl.float32, is_pure=True, pack=2
        )
    return value.to(tl.float32)


@triton.jit
def counted(counter):
    """The int64 of a counter (fastdiff.ops.counters): of a number its bits, or what stands on the
    device at its address."""
    if counter.dtype.is_ptr():
        counter = tl.load(counter)
    return counter.to(tl.int64)


@triton.jit
def normals_of(seed, step, number, quad, EXACT: tl.constexpr):
    sample_low, sample_high = low_word(number), high_word(number)
    return philox_normals(
        low_word(seed), high_word(seed), low_word(step), sample_low, sample_high, quad, EXACT
    )


@triton.jit
def draw(
    seed,
    step,
    number,
    first_quad,
    BLOCK: tl.constexpr,
    dtype: tl.constexpr,
    EXACT: tl.constexpr = False,
):
    """Float32 noise of elements 4·first_quad … of sample ``number`` at the counter's ``step``, the
    low bits of each. ``dtype``: of the elements in memory, where a thread accesses 16 bytes: it
    draws just these, else the noise would change threads. EXACT: the CPU's to the bit."""
    if dtype.primitive_bitwidth == 16:
        quad = first_quad + 2 * tl.arange(0, BLOCK // 2).to(tl.uint32)
        n0, n1, n2, n3 = normals_of(seed, step, number, quad, EXACT)
        n4, n5, n6, n7 = normals_of(seed, step, number, quad + 1, EXACT)
        return tl.interleave(interleave4(n0, n2, n4, n6), interleave4(n1, n3, n5, n7))
    quad = first_quad + tl.arange(0, BLOCK).to(tl.uint32)
    n0, n1, n2, n3 = normals_of(seed, step, number, quad, EXACT)
    return interleave4(n0, n1, n2, n3)


def is_one_run(shape: tuple[int, int, int], *layouts: tuple[int, int, int, int]) -> bool:
    """Whether each operand's samples are contiguous."""
    return shape[1] == 1 and all(layout[3] == 1 for layout in layouts)


def is_wide(shape: tuple[int, int, int]) -> bool:
    """Whether a sample's elements need 64-bit numbers."""
    return shape[1] * shape[2] >= 2**31 - 4 * BLOCK

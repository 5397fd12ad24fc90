"""Counter-based Gaussian noise as Triton device functions: csrc/common/philox.h says what and why.

The float operations are those of the header, in its order. A kernel launched with
``enable_fp_fusion=False`` therefore gives the same bits as the CPU; where Triton may contract a
product and a sum, results agree up to rounding. The integers always agree bit for bit.
"""

import triton
import triton.language as tl


@triton.jit
def low_word(value):
    """The low 32 bits of an int64, as uint32."""
    return (value & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def high_word(value):
    return low_word(value >> 32)


@triton.jit
def uniform(word):
    """word·2^-32 + 2^-33 rounded to float32, in (0, 1]."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def natural_log(u):
    offset = u.to(tl.int32, bitcast=True) - 0x3F3504F3  # bits of √½
    e = (offset >> 23).to(tl.float32)
    f = ((offset & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0

    p = -0.0735380277 * f + 0.126151875
    p = p * f - 0.132034585
    p = p * f + 0.142280996
    p = p * f - 0.166213155
    p = p * f + 0.199997663
    p = p * f - 0.250008523
    p = p * f + 0.333333552

    f2 = f * f
    low = (f * f2) * p
    low = low + e * -2.12194440e-4
    low = low + f2 * -0.5
    return (low + f) + e * 0.693359375


@triton.jit
def cos_sin_turns(u):
    """(cos 2πu, sin 2πu)."""
    turns4 = u * 4.0
    quadrant = (turns4 + 0.5).to(tl.int32)
    f = turns4 - quadrant.to(tl.float32)
    s = f * f

    p = -0.00468584523 * s + 0.0797125027
    p = p * s - 0.645966649
    p = p * s + 1.57079637
    sine = p * f

    q = 0.00089448638 * s - 0.0208555963
    q = q * s + 0.253668547
    q = q * s - 1.23370051
    cosine = q * s + 1.0

    swap = (quadrant & 1) != 0
    cos_out = tl.where(swap, sine, cosine)
    sin_out = tl.where(swap, cosine, sine)
    cos_out = tl.where(((quadrant + 1) & 2) != 0, -cos_out, cos_out)
    sin_out = tl.where((quadrant & 2) != 0, -sin_out, sin_out)
    return cos_out, sin_out


@triton.jit
def box_muller(word0, word1):
    radius = tl.sqrt_rn(-2.0 * natural_log(uniform(word0)))
    cosine, sine = cos_sin_turns(uniform(word1))
    return radius * cosine, radius * sine


@triton.jit
def philox_words(seed_low, seed_high, step, sample_low, sample_high, quad):
    """Philox4x32-10 of counter (quad, step, sample) and key seed; uint32 in, uint32 out."""
    step = tl.full(quad.shape, 0, tl.uint32) + step
    sample_low = tl.full(quad.shape, 0, tl.uint32) + sample_low
    sample_high = tl.full(quad.shape, 0, tl.uint32) + sample_high
    return tl.philox_impl(quad, step, sample_low, sample_high, seed_low, seed_high)


@triton.jit
def philox_normals(seed_low, seed_high, step, sample_low, sample_high, quad):
    """Elements 4·quad … 4·quad + 3 of one sample, as four tensors of quad's shape."""
    r0, r1, r2, r3 = philox_words(seed_low, seed_high, step, sample_low, sample_high, quad)
    n0, n1 = box_muller(r0, r1)
    n2, n3 = box_muller(r2, r3)
    return n0, n1, n2, n3


@triton.jit
def interleave4(a, b, c, d):
    """a[0], b[0], c[0], d[0], a[1], …"""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))

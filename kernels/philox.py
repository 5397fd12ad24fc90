"""Counter-based Gaussian noise as Triton device functions: csrc/common/philox.h says what and why.

The float operations are those of the header, in its order. A kernel launched with
``enable_fp_fusion=False`` therefore gives the same bits as the CPU, where EXACT normals are asked
for; else the GPU's approximate functions give them within csrc/cuda/fast_normal.h's bound. The
integers always agree bit for bit.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # it has no assembly


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
def instruction(assembly: tl.constexpr, x):
    return tl.inline_asm_elementwise(assembly, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def approximate_log2(x):
    return tl.log2(x) if INTERPRETED else instruction("lg2.approx.ftz.f32 $0, $1;", x)


@triton.jit
def approximate_sqrt(x):
    return tl.sqrt(x) if INTERPRETED else instruction("sqrt.approx.ftz.f32 $0, $1;", x)


@triton.jit
def approximate_cos(x):
    return tl.cos(x) if INTERPRETED else instruction("cos.approx.ftz.f32 $0, $1;", x)


@triton.jit
def approximate_sin(x):
    return tl.sin(x) if INTERPRETED else instruction("sin.approx.ftz.f32 $0, $1;", x)


@triton.jit
def linear(x, slope: tl.constexpr, offset: tl.constexpr):
    """x·slope + offset in one rounding."""
    return tl.fma(x, tl.full(x.shape, slope, tl.float32), tl.full(x.shape, offset, tl.float32))


@triton.jit
def fast_box_muller(word0, word1):
    """``box_muller`` as csrc/cuda/fast_normal.h has it, operation by operation."""
    u = linear(word0.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    v = 1.0 - u
    near_one = v * (v + 2.0)
    elsewhere = approximate_log2(u) * -1.38629436
    radius = approximate_sqrt(tl.where(v < 0.0078125, near_one, elsewhere))
    turns = word1.to(tl.int32, bitcast=True).to(tl.float32)  # times 2^32
    x = linear(turns, 1.462918119976564e-09, 7.31459059988282e-10)  # 2π·2^-32, 2π·2^-33
    return radius * approximate_cos(x), radius * approximate_sin(x)


@triton.jit
def wide_product(a, b: tl.constexpr):
    """The high and the low words of a·b: one instruction, where tl.philox takes two."""
    product = a.to(tl.uint64) * b
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox_words(seed_low, seed_high, step, sample_low, sample_high, quad):
    """Philox4x32-10 of counter (quad, step, sample) and key seed; uint32 in, uint32 out."""
    step = tl.full(quad.shape, 0, tl.uint32) + step
    sample_low = tl.full(quad.shape, 0, tl.uint32) + sample_low
    sample_high = tl.full(quad.shape, 0, tl.uint32) + sample_high
    c0, c1, c2, c3 = quad, step, sample_low, sample_high
    for _ in tl.static_range(10):
        high0, low0 = wide_product(c0, 0xD2511F53)
        high1, low1 = wide_product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ seed_low, low1, high0 ^ c3 ^ seed_high, low0
        seed_low += 0x9E3779B9
        seed_high += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def philox_normals(seed_low, seed_high, step, sample_low, sample_high, quad, EXACT: tl.constexpr):
    """Elements 4·quad … 4·quad + 3 of one sample, as four tensors of quad's shape."""
    r0, r1, r2, r3 = philox_words(seed_low, seed_high, step, sample_low, sample_high, quad)
    if EXACT:
        n0, n1 = box_muller(r0, r1)
        n2, n3 = box_muller(r2, r3)
    else:
        n0, n1 = fast_box_muller(r0, r1)
        n2, n3 = fast_box_muller(r2, r3)
    return n0, n1, n2, n3


@triton.jit
def interleave4(a, b, c, d):
    """a[0], b[0], c[0], d[0], a[1], …"""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))

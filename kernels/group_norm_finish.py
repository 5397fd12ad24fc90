"""The end of group_norm_silu's backward: the gradients of the parameters, FiLM and embedding.

    dweight = Σ_n (1 + scale)·Σ dv·x̂          dbias  = Σ_n (1 + scale)·Σ dv
    dscale  = weight·Σ dv·x̂ + bias·Σ dv       dshift = Σ dv          dadd = Σ dx

The sums within are over the positions, float32 (N, C); v = (x̂·weight + bias)·(1 + scale) + shift.
Bytes moved: the sums once, with scale, and each gradient once: about a microsecond.

A program takes CB channels of all samples, SB samples at once: lane i adds up the samples i,
i + SB, … in order, then the lanes are summed. Deterministic: no atomics.
"""

import triton
import triton.language as tl

from .group_norm_tiles import UNSPECIALIZED, coefficients
from .launcher import Launch

CHANNELS, SAMPLES = 32, 32  # of a tile: a line of float32 side by side


@triton.jit(do_not_specialize=UNSPECIALIZED)
def finish_kernel(
    sums,  # (3, N, C): Σ dv, Σ dv·x̂, Σ dx
    plane,  # N·C
    weight,  # each of the following, or None
    bias,
    scale,
    scale_stride,
    dweight,
    dbias,
    dscale,
    dshift,
    dadd,
    samples,
    channels,
    CB: tl.constexpr,
    SB: tl.constexpr,
):
    channel = tl.program_id(0) * CB + tl.arange(0, CB)
    real = channel < channels
    w, b = coefficients(weight, bias, None, None, False, 0, 0, 0, channel, real, CB)
    total_dv = tl.zeros((SB, CB), tl.float32)
    total_dv_normal = tl.zeros((SB, CB), tl.float32)
    for first in range(0, samples, SB):
        sample = (first + tl.arange(0, SB)).to(tl.int64)[:, None]
        mask = (sample < samples) & real[None, :]
        at = sample * channels + channel[None, :]
        dv = tl.load(sums + at, mask=mask, other=0.0)
        dv_normal = tl.load(sums + plane + at, mask=mask, other=0.0)
        if dscale is not None:
            value = dv_normal * w[None, :] + dv * b[None, :]
            tl.store(dscale + at, value.to(dscale.dtype.element_ty), mask=mask)
        if dshift is not None:
            tl.store(dshift + at, dv.to(dshift.dtype.element_ty), mask=mask)
        if dadd is not None:
            sum_dx = tl.load(sums + plane + plane + at, mask=mask, other=0.0)
            tl.store(dadd + at, sum_dx.to(dadd.dtype.element_ty), mask=mask)
        if scale is not None:
            by = scale + sample * scale_stride + channel[None, :]
            factor = 1.0 + tl.load(by, mask=mask, other=0.0).to(tl.float32)
            dv *= factor
            dv_normal *= factor
        total_dv += dv
        total_dv_normal += dv_normal
    if dweight is not None:
        value = tl.sum(total_dv_normal, 0).to(dweight.dtype.element_ty)
        tl.store(dweight + channel, value, mask=real)
    if dbias is not None:
        value = tl.sum(total_dv, 0).to(dbias.dtype.element_ty)
        tl.store(dbias + channel, value, mask=real)


def finish_for(samples: int, channels: int) -> Launch:
    """The launch for N = ``samples`` and C = ``channels``. It takes float32 sums (3, N, C) of dv,
    dv·x̂ and dx over the positions, the stride of its planes, weight, bias, scale (N, C) of inner
    stride 1 with the stride of its rows, each or None, and fills those of dweight, dbias (C,),
    dscale, dshift, dadd (N, C) that are not None, dense, in their dtypes."""
    return Launch(
        finish_kernel, (triton.cdiv(channels, CHANNELS),), samples, channels,
        CB=CHANNELS, SB=SAMPLES, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip

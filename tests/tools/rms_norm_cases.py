"""Inputs, float64 truth and error bounds for the tests of rms_norm_silu."""

import math

import torch
import torch.nn.functional as F

from fastdiff.ops import native, rms_norm_silu
from norm_cases import LAYOUTS, error, ulps


def equations(x, weight, *, eps=1e-12, scale=None, shift=None, activation="silu"):
    """Position by position in float64, with nothing of the implementation."""
    n, c = x.shape[:2]
    v = x.double().reshape(n, c, x[:1, :1].numel())
    norm = (v**2).sum(1, keepdim=True).sqrt().clamp(min=eps)
    h = v / norm * c**0.5 * weight.double().reshape(1, c, 1)
    if scale is not None:
        h = h * (1 + scale.double().reshape(n, c, 1)) + shift.double().reshape(n, c, 1)
    h = h.reshape(x.shape)
    return h * torch.sigmoid(h) if activation == "silu" else h


def eager(x, weight, *, eps=1e-12, scale=None, shift=None, activation="silu"):
    """What denoising-diffusion-pytorch's Block has after its convolution, in the dtype of x."""
    ones = (1,) * (x.dim() - 2)
    weight = weight.to(x.dtype).reshape(1, -1, *ones)
    h = F.normalize(x, dim=1, eps=eps) * weight * x.shape[1] ** 0.5
    if scale is not None:
        scale, shift = (t.to(x.dtype).reshape(*x.shape[:2], *ones) for t in (scale, shift))
        h = h * (scale + 1) + shift
    return F.silu(h) if activation == "silu" else h


def case(
    n, c, spatial, *, dtype=torch.float32, channels_last=False, film=None, parameters=None,
    std=1.0,
):  # fmt: skip
    """The tensors of one call by name. ``film``: None, "rows" (N, C), or "chunks" (N, C, 1, …) of
    one tensor, as a Block gets them; ``parameters``: the weight's dtype, else that of x."""
    x = (torch.randn(n, c, *spatial) * std).to(dtype)
    if channels_last and len(spatial) in LAYOUTS:
        x = x.contiguous(memory_format=LAYOUTS[len(spatial)])
    elif channels_last and spatial:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    weight = (1 + 0.3 * torch.randn(1, c, *[1] * len(spatial))).to(parameters or dtype)
    tensors = {"x": x, "weight": weight, "scale": None, "shift": None}
    if film == "rows":
        tensors["scale"], tensors["shift"] = torch.randn(2, n, c).to(dtype)
    elif film == "chunks":
        both = torch.randn(n, 2 * c, *[1] * len(spatial)).to(dtype)
        tensors["scale"], tensors["shift"] = both.chunk(2, dim=1)
    return tensors


def check(tensors, rounds=2.0, **options):
    """At most twice PyTorch's error, and ``rounds`` roundings of the largest number on the way."""
    x = tensors["x"]
    result = rms_norm_silu(**tensors, **options)
    assert result.dtype == x.dtype and result.shape == x.shape
    if x.numel() == 0:
        return result
    truth = equations(**tensors, **options)
    before = equations(**tensors, **{**options, "activation": None})
    own = error(eager(**tensors, **options), truth)
    if not math.isfinite(own):  # its eps is zero in float16, and its norms may be infinite
        own = 0.0
    bound = 2 * own + ulps(rounds, x.dtype, before)
    assert error(result, truth) <= bound, (error(result, truth), own)
    return result


def native_shape(n, c, positions, *, dtype=torch.float32, **fields):
    """What the library is told of a call without FiLM, all tensors of one dtype."""
    code = native.DTYPE_CODES[dtype]
    defaults = dict(channels_last=False, silu=True, eps=1e-12, dtype=code, weight_dtype=code)
    defaults |= dict(film_dtype=code, scale_stride=c, shift_stride=c)
    return native.library().RmsNormShape(
        samples=n, channels=c, positions=positions, **(defaults | fields)
    )

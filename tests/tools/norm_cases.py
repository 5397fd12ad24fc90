"""Inputs, float64 truth and error bounds for the tests of group_norm_silu."""

import contextlib
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops import native

LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}
TENSORS = ("x", "weight", "bias", "scale", "shift", "add")
WIDTHS = {"baseline": 4, "avx2": 8, "avx512": 16}


def equations(
    x, num_groups, weight, bias, eps=1e-5, *, scale=None, shift=None, add=None, activation="silu"
):
    """Group by group in float64, with nothing of the implementation."""

    def per_channel(value):
        value = value.double()
        return (
            value if value.shape == x.shape else value.reshape(*value.shape, *[1] * (x.dim() - 2))
        )

    n, c = x.shape[:2]
    h = x.double() if add is None else x.double() + per_channel(add)
    groups = h.reshape(n, num_groups, -1) if n else h.reshape(0, num_groups, 1)
    mean = groups.mean(2, keepdim=True)
    variance = ((groups - mean) ** 2).mean(2, keepdim=True)
    h = ((groups - mean) / (variance + eps).sqrt()).reshape(x.shape)
    if weight is not None:
        h = h * per_channel(weight[None]) + per_channel(bias[None])
    if scale is not None:
        h = h * (1 + per_channel(scale)) + per_channel(shift)
    return h * torch.sigmoid(h) if activation == "silu" else h


def eager(
    x, num_groups, weight, bias, eps=1e-5, *, scale=None, shift=None, add=None, activation="silu"
):
    """What a model written with PyTorch's own operations computes, in the dtype of x."""

    def per_channel(value):
        value = value.to(x.dtype)
        return (
            value if value.shape == x.shape else value.reshape(*value.shape, *[1] * (x.dim() - 2))
        )

    h = x if add is None else x + per_channel(add)
    if weight is not None:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    h = torch.group_norm(h, num_groups, weight, bias, eps)
    if scale is not None:
        h = h * (1 + per_channel(scale)) + per_channel(shift)
    return F.silu(h) if activation == "silu" else h


def case(
    n, c, spatial, *, dtype=torch.float32, channels_last=False, film=None, add=None,
    parameters=torch.float32, mean=0.0, std=1.0,
):  # fmt: skip
    """The tensors of one call by name, x included. ``film``: None, "plain", or "chunks" of one
    tensor; ``add``: None, "embedding", "strided", or "residual"."""
    x = (torch.randn(n, c, *spatial) * std + mean).to(dtype)
    if channels_last and len(spatial) in LAYOUTS:
        x = x.contiguous(memory_format=LAYOUTS[len(spatial)])
    tensors = {"x": x, "weight": None, "bias": None}
    if parameters is not None:
        tensors["weight"] = (1 + 0.3 * torch.randn(c)).to(parameters)
        tensors["bias"] = (0.3 * torch.randn(c)).to(parameters)
    if film == "chunks":
        tensors["scale"], tensors["shift"] = torch.randn(n, 2 * c).to(dtype).chunk(2, dim=1)
    elif film is not None:
        tensors["scale"], tensors["shift"] = torch.randn(2, n, c).to(dtype)
    if add == "embedding":
        tensors["add"] = torch.randn(n, c).to(dtype)
    elif add == "strided":
        tensors["add"] = torch.randn(n, 3 * c).to(dtype)[:, c : 2 * c]
    elif add == "residual":
        tensors["add"] = torch.empty_like(x).copy_(torch.randn(n, c, *spatial))
    return tensors


def native_shape(n, c, positions, groups=1, *, dtype=torch.float32, **fields):
    """What the library is told of a call: x and SiLU alone, all tensors of one dtype and dense,
    where ``fields`` do not say otherwise."""
    code = native.DTYPE_CODES[dtype]
    defaults = dict(channels_last=False, silu=True, eps=1e-5, add=0, dtype=code)
    defaults |= dict(affine_dtype=code, film_dtype=code, add_dtype=code)
    defaults |= dict(scale_stride=c, shift_stride=c, add_stride=c)
    sizes = dict(samples=n, channels=c, positions=positions, groups=groups)
    return native.library().GroupNormShape(**sizes, **(defaults | fields))


def run(function, tensors, num_groups, **options):
    named = {name: tensor for name, tensor in tensors.items() if name != "x"}
    return function(tensors["x"], num_groups, **named, **options)


def gradients(function, tensors, num_groups, upstream, **options):
    """The gradient of every tensor of the call, by name."""
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items() if v is not None}
    result = run(function, {**tensors, **leaves}, num_groups, **options)
    found = torch.autograd.grad(result, list(leaves.values()), upstream)
    return dict(zip(leaves, found, strict=True))


def doubled(tensors):
    return {k: None if v is None else v.double() for k, v in tensors.items()}


def error(result: Tensor, truth: Tensor) -> float:
    return (result.double() - truth).abs().max().item() if truth.numel() else 0.0


def ulps(count: float, dtype: torch.dtype, truth: Tensor) -> float:
    """``count`` units in the last place of the largest number of ``truth``."""
    return count * torch.finfo(dtype).eps * truth.abs().max().item() if truth.numel() else 0.0


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def poison(monkeypatch):
    """Every tensor that is allocated without values starts as NaN."""
    for name in ("empty", "empty_like"):
        made = getattr(torch, name)

        def poisoned(*args, made=made, **kwargs):
            return made(*args, **kwargs).fill_(float("nan"))

        monkeypatch.setattr(torch, name, poisoned)
    new_empty = Tensor.new_empty
    monkeypatch.setattr(
        Tensor, "new_empty", lambda *args, **kw: new_empty(*args, **kw).fill_(float("nan"))
    )


@pytest.fixture(scope="module", autouse=True)
def kernels_at_any_size():
    """The choice leaves small contiguous tensors that want gradients to PyTorch: not in these
    tests. A module that imports this has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["fastdiff.ops.group_norm_silu.op"], "SMALL", 0)
        yield

"""Norms and activations inside a model: which are which."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.fused import Fused
from fastdiff.models.replicas.replica import twin_of

_generator = torch.Generator()  # nobody else's moves; accelerate runs in one thread at a time


def seed() -> None:
    """Begin ``randn`` anew."""
    _generator.manual_seed(0)


def randn(*shape: Any) -> Tensor:
    """What a module is tried on."""
    return torch.randn(*shape, generator=_generator)


def holds_group_norm(module: Any) -> bool:
    """nn.GroupNorm with weights, or a class derived from it, which may add to it."""
    derived = isinstance(module, nn.GroupNorm) and not isinstance(module, Fused)
    return derived and isinstance(module._parameters.get("bias"), nn.Parameter)


def is_group_norm(module: Any) -> bool:
    """nn.GroupNorm with weights, or a class derived from it that computes the same (older code has
    one that does so in float32, as the fused one does)."""
    if not holds_group_norm(module):
        return False
    if type(module) is nn.GroupNorm:
        return True
    channels, device = module.num_channels, module.weight.device
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(device)
        for shape in ((2, channels, 3), (channels,), (channels,))
    )
    try:
        with twin_of(module) as tried, torch.no_grad():
            y = torch.func.functional_call(tried, {"weight": weight, "bias": bias}, (x,))
        expected = F.group_norm(x, module.num_groups, weight, bias, module.eps)
        return torch.allclose(y, expected, atol=1e-5)
    except Exception:  # whatever it does with such an input
        return False


def is_silu(module: Any) -> bool:
    """nn.SiLU, or a module without parameters that computes it (older code has its own)."""
    if type(module) is nn.SiLU:
        return True
    name = type(module).__name__.lower()
    if not isinstance(module, nn.Module) or name not in ("silu", "swish"):
        return False
    if any(True for _ in module.parameters()):
        return False
    x = torch.linspace(-8, 8, 33)
    return torch.allclose(module(x), F.silu(x), atol=1e-6)


def is_normed(x: Any) -> bool:
    """Whether x is what the fused norm takes. A norm's own forward has other inputs, torch.fx's
    for one."""
    return isinstance(x, Tensor) and x.dim() > 1 and x.is_floating_point()

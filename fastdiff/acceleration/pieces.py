"""Norms and activations inside a model: which are which."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def is_group_norm(module: Any) -> bool:
    """nn.GroupNorm with weights, or a subclass of the published name, which computes in float32 as
    the fused one does."""
    named = type(module) is nn.GroupNorm or type(module).__name__ == "GroupNorm32"
    return named and isinstance(module, nn.GroupNorm) and module.bias is not None


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

"""The blocks of denoising-diffusion-pytorch: RMS norms over the channels, and attention."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.acceleration.fused_class import Fusion
from fastdiff.acceleration.pieces import is_silu
from fastdiff.ops.rms_norm_silu import rms_norm_silu


def fusions(module: Any) -> Iterator[tuple[Fusion, tuple[Any, ...]]]:
    """What may fuse this module, with inputs to try it on; nothing for another kind of module."""
    name = type(module).__name__
    if name == "Block" and _is_block(module):
        x, width = torch.randn(2, module.proj.in_channels, 4, 4), module.proj.out_channels
        film = tuple(torch.randn(2, width, 1, 1) for _ in range(2))
        fusion = Fusion("norm, FiLM and activation in one", _block, ("norm", "act"))
        yield fusion, (x, film)
    elif _is_rms_norm(module):
        fusion = Fusion("norm in one", _rms_norm, unchanged=("scale",))
        yield fusion, (torch.randn(2, module.g.numel(), 4, 4),)
    elif name == "Attend" and _is_attend(module):
        fusion = Fusion("PyTorch's scaled_dot_product_attention", _attend, unchanged=("flash",))
        yield fusion, tuple(torch.randn(2, 3, 5, 8) for _ in range(3))


def _is_rms_norm(module: Any) -> bool:
    """Of images: g (1, C, 1, 1), scale √C."""
    g = getattr(module, "g", None)
    return (
        type(module).__name__ == "RMSNorm"
        and isinstance(g, nn.Parameter)
        and g.shape == (1, g.numel(), 1, 1)
        and getattr(module, "scale", None) == g.numel() ** 0.5
    )


def _is_block(module: Any) -> bool:
    parts = [getattr(module, name, None) for name in ("proj", "norm", "act", "dropout")]
    proj, norm, act, dropout = parts
    return (
        isinstance(proj, nn.Conv2d)
        and _is_rms_norm(norm)
        and is_silu(act)
        and isinstance(dropout, nn.Module)
    )


def _is_attend(module: Any) -> bool:
    names = ("attn_dropout", "scale", "flash")
    return all(hasattr(module, name) for name in names) and not module.flash


def _block(self: Any, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
    h = self.proj(x)
    scale, shift = (None, None) if scale_shift is None else (s.to(h.dtype) for s in scale_shift)
    return self.dropout(rms_norm_silu(h, self.norm.g, scale=scale, shift=shift))


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    return rms_norm_silu(x, self.g, activation=None)


def _attend(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dropout = self.attn_dropout.p if self.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)

"""The blocks of denoising-diffusion-pytorch, old and new: RMS and group norms, and attention."""

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.acceleration.fused_class import Fusion, Refused, Trials
from fastdiff.acceleration.pieces import holds_group_norm, is_silu, randn
from fastdiff.models.blocks import apply_norm
from fastdiff.ops.attention.op import attention
from fastdiff.ops.rms_norm_silu.op import rms_norm_silu

Film = tuple[Tensor, Tensor]


def fusions(module: Any) -> Iterator[tuple[Fusion, Trials]]:
    """What may fuse this module, with inputs to try it on; nothing for another kind of module."""
    name = type(module).__name__
    if name == "Block" and _is_block(module):
        ones = [1] * (module.proj.weight.dim() - 2)
        x = randn(2, module.proj.in_channels, *[4 * one for one in ones])
        film = tuple(randn(2, module.proj.out_channels, *ones) for _ in range(2))
        yield (
            Fusion("norm, FiLM and activation in one", _block, ("norm", "act")),
            [(x, film), (x, None), (x,)],
        )
    elif _is_rms_norm(module):
        shape = (2, module.g.numel(), *[4] * (module.g.dim() - 2))
        yield Fusion("norm in one", _rms_norm), [(randn(shape),)]
    elif name == "Attend" and hasattr(module, "attn_dropout") and hasattr(module, "flash"):
        if module.flash:
            raise Refused("its flash attention is PyTorch's scaled_dot_product_attention already")
        fusion = Fusion("PyTorch's scaled_dot_product_attention", _attend)
        yield fusion, [tuple(randn(2, 3, 5, 8) for _ in range(3))]
    elif name == "Attention" and _is_attention(module):
        fusion = Fusion("attention without copies", _attention)
        yield fusion, [(randn(2, module.to_qkv.in_channels, 4, 4),)]


def _is_rms_norm(module: Any) -> bool:
    """Of images: g (1, C, 1, 1), or as many ones as there are dimensions."""
    g = getattr(module, "g", None)
    is_row = isinstance(g, nn.Parameter) and g.dim() > 2 and g.shape[1] == g.numel()
    return type(module).__name__ == "RMSNorm" and is_row


def _is_block(module: Any) -> bool:
    parts = [getattr(module, name, None) for name in ("proj", "norm", "act")]
    proj, norm, act = parts
    return (
        isinstance(proj, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and (_is_rms_norm(norm) or holds_group_norm(norm))
        and is_silu(act)
    )


def _is_attention(module: Any) -> bool:
    """The whole of it in one module, as before there was an Attend."""
    heads, qkv = getattr(module, "heads", None), getattr(module, "to_qkv", None)
    out = getattr(module, "to_out", None)
    whole = isinstance(heads, int) and type(qkv) is nn.Conv2d and isinstance(out, nn.Module)
    return whole and not isinstance(getattr(module, "attend", None), nn.Module)


def _block(self: Any, x: Tensor, scale_shift: Film | None) -> Tensor:
    h = self.proj(x)
    if scale_shift is None:
        h = _norm(self.norm, h)
    else:
        scale, shift = (film.to(h.dtype) for film in scale_shift)
        rows = (*h.shape[:2], *[1] * (h.dim() - 2))
        if scale.shape == shift.shape == rows:
            h = _norm(self.norm, h, scale=scale.flatten(1), shift=shift.flatten(1))
        else:
            h = F.silu(_norm(self.norm, h, activation=None) * (scale + 1) + shift)
    dropout = getattr(self, "dropout", None)
    return h if dropout is None else dropout(h)


def _norm(norm: Any, h: Tensor, **options: Any) -> Tensor:
    if isinstance(norm, nn.GroupNorm):
        return apply_norm(norm, h, **options)
    return rms_norm_silu(h, norm.g, **options)


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    return rms_norm_silu(x, self.g, activation=None)


def _attend(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dropout = self.attn_dropout.p if self.training else 0.0
    scale = getattr(self, "scale", None)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)


def _attention(self: Any, x: Tensor) -> Tensor:
    h = attention(self.to_qkv(x).flatten(2), self.heads, order="qkv_first")  # (N, C, T)
    return self.to_out(h.unflatten(2, x.shape[2:]))

"""The blocks of Ho et al.'s U-Net as PyTorch ports, taming-transformers and latent diffusion have
them: layers with names of their own, and SiLU a function in their forward."""

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.acceleration.fused_class import Fusion, Trials
from fastdiff.acceleration.pieces import is_group_norm, randn
from fastdiff.models.blocks import apply_norm


def fusions(module: Any) -> Iterator[tuple[Fusion, Trials]]:
    """What may fuse this module, with inputs to try it on; nothing for another kind of module."""
    if _is_resnet_block(module):
        x = randn(2, module.norm1.num_channels, 4, 4)
        projection = getattr(module, "temb_proj", None)
        trials: list[Any] = [(x,), (x, None)]
        if isinstance(projection, nn.Linear):
            trials.append((x, randn(2, projection.in_features)))
        how = "both norms with what is around them"
        yield Fusion(how, _resnet_block, ("norm1", "norm2")), trials
    elif _is_attention_block(module):
        fusion = Fusion("norm and attention without copies", _attention_block, ("norm",))
        yield fusion, [(randn(2, module.norm.num_channels, 4, 4),)]
    elif _is_cross_attention(module):
        x = randn(2, 5, module.to_q.in_features)
        context = randn(2, 3, module.to_k.in_features)
        how = "attention without copies (PyTorch's scaled_dot_product_attention)"
        yield Fusion(how, _cross_attention), [(x,), (x, context)]


def _is_resnet_block(module: Any) -> bool:
    parts = [getattr(module, name, None) for name in ("norm1", "norm2", "conv1", "conv2")]
    others = ("time_emb_proj", "nonlinearity", "act", "bn1")  # of other codebases' blocks
    return (
        all(is_group_norm(norm) for norm in parts[:2])
        and all(isinstance(layer, nn.Module) for layer in parts[2:])
        and not any(hasattr(module, name) for name in others)
    )


def _resnet_block(self: Any, x: Tensor, temb: Tensor | None) -> Tensor:
    h = self.conv1(apply_norm(self.norm1, x))
    if temb is None:
        h = apply_norm(self.norm2, h)
    else:
        h = apply_norm(self.norm2, h, add=self.temb_proj(F.silu(temb)).to(h.dtype))
    dropout = getattr(self, "dropout", None)
    h = self.conv2(h if dropout is None else dropout(h))
    for name in ("conv_shortcut", "nin_shortcut"):
        shortcut = self._modules.get(name)
        x = x if shortcut is None else shortcut(x)
    return x + h


def _is_attention_block(module: Any) -> bool:
    layers = [getattr(module, name, None) for name in ("q", "k", "v", "proj_out")]
    pointwise = (type(layer) is nn.Conv2d and layer.kernel_size == (1, 1) for layer in layers)
    return is_group_norm(getattr(module, "norm", None)) and all(pointwise)


def _attention_block(self: Any, x: Tensor) -> Tensor:
    h = apply_norm(self.norm, x, activation=None)
    query, key, value = (
        layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v)
    )  # (N, 1, T, C)
    h = F.scaled_dot_product_attention(query, key, value)[:, 0].transpose(1, 2)
    return x + self.proj_out(h.unflatten(2, x.shape[2:]))


def _is_cross_attention(module: Any) -> bool:
    layers = [getattr(module, name, None) for name in ("to_q", "to_k", "to_v")]
    return (
        all(isinstance(layer, nn.Linear) for layer in layers)
        and isinstance(getattr(module, "to_out", None), nn.Module)
        and not isinstance(module.to_out, nn.ModuleList)
        and isinstance(getattr(module, "heads", None), int)
    )


def _cross_attention(self: Any, x: Tensor, context: Tensor | None) -> Tensor:
    """x (N, T, C), context (N, S, D)."""
    context = x if context is None else context
    query, key, value = (
        layer(given).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        for layer, given in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
    )
    h = F.scaled_dot_product_attention(query, key, value)
    return self.to_out(h.transpose(1, 2).flatten(2))

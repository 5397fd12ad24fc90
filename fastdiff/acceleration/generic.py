"""GroupNorm in any model: before a SiLU in a Sequential, or on its own."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.acceleration.fused_class import Fusion
from fastdiff.acceleration.pieces import is_group_norm, is_silu
from fastdiff.models.blocks import apply_norm


def fusions(module: Any) -> Iterator[tuple[Fusion, tuple[Any, ...]]]:
    """What may fuse this module, with inputs to try it on; nothing for another kind of module."""
    if type(module) is nn.Sequential:
        norms = tuple(i for i in range(len(module) - 1) if _is_pair(module[i], module[i + 1]))
        bypassed = tuple(str(i + after) for i in norms for after in (0, 1))
        if norms:
            fusion = Fusion("norm and activation in one", _sequential, bypassed)
            yield replace(fusion, options=(("norms", norms),)), ()
    elif is_group_norm(module):
        channels = module.get_parameter("weight").numel()
        fusion = Fusion("norm in the layout of its input", _group_norm)
        yield fusion, (torch.randn(2, channels, 4, 4),)


def _is_pair(norm: nn.Module, activation: nn.Module) -> bool:
    return is_group_norm(norm) and is_silu(activation)


def _sequential(self: nn.Sequential, x: Any, *, norms: tuple[int, ...]) -> Any:
    for i, layer in enumerate(self):
        if i in norms:
            x = apply_norm(layer, x)
        elif i - 1 not in norms:
            x = layer(x)
    return x


def _group_norm(self: nn.Module, x: Tensor) -> Tensor:
    return apply_norm(self, x, activation=None)

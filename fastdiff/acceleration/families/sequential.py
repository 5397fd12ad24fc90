"""GroupNorm in any model: before a SiLU in a Sequential, or on its own."""

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.acceleration.fused_class import Fusion, Trials
from fastdiff.acceleration.pieces import holds_group_norm, is_group_norm, is_normed, is_silu, randn
from fastdiff.models.blocks import apply_norm

ALONE = "norm in the layout of its input"


def fusions(module: Any) -> Iterator[tuple[Fusion, Trials]]:
    """What may fuse this module, with inputs to try it on; nothing for another kind of module."""
    if type(module) is nn.Sequential:
        norms = tuple(i for i in range(len(module) - 1) if _is_pair(module[i], module[i + 1]))
        bypassed = tuple(str(i + after) for i in norms for after in (0, 1))
        if norms:
            options = (("norms", norms),)
            yield Fusion("norm and activation in one", _sequential, bypassed, options=options), ()
    elif holds_group_norm(module):
        channels = module.get_parameter("weight").numel()
        trials = [(randn(2, channels, *[4] * dims),) for dims in range(4)]
        # Some derived classes have an activation of their own.
        for how, activation in ((ALONE, None), ("norm with its activation", "silu")):
            yield Fusion(how, _group_norm, options=(("activation", activation),)), trials


def _is_pair(norm: nn.Module, activation: nn.Module) -> bool:
    return is_silu(activation) and is_group_norm(norm)


def _sequential(self: nn.Sequential, x: Any, *, norms: tuple[int, ...]) -> Any:
    for i, layer in enumerate(self):
        if i in norms:
            x = apply_norm(layer, x) if is_normed(x) else F.silu(layer(x))
        elif i - 1 not in norms:
            x = layer(x)
    return x


def _group_norm(self: nn.Module, x: Tensor, *, activation: str | None) -> Tensor:
    return apply_norm(self, x, activation=activation)

"""Which weights may be laid out channels last."""

import weakref
from collections import Counter
from typing import Any

from torch import nn

from fastdiff.models.code import names_in_forward

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def plain_convolutions(model: nn.Module) -> list[nn.Module]:
    """The 2-D convolutions whose ``weight`` nothing but their own forward reads, as far as can
    be seen.

    What else reads a 4-D parameter may count on its strides: an adapter its magnitudes and the
    layers inside of it (with a ``base_layer``, as peft has it), a parametrization or a class that
    derives from a convolution what it computes with, a block or a tied layer the weight itself.
    """
    owners: Counter[nn.Parameter] = Counter()
    for module in model.modules():
        owners.update(p for p in module._parameters.values() if p is not None)
    read: set[nn.Module] = set()
    _collect(model, False, read)
    return [
        module
        for module in model.modules()
        if type(module) in CONVOLUTIONS
        and module not in read
        and type(module._parameters.get("weight")) is nn.Parameter
        and owners[module._parameters["weight"]] == 1  # type: ignore[index]
    ]


def _collect(module: nn.Module, is_read: bool, read: set[nn.Module]) -> None:
    """The modules, from this one on, whose parameters others read; ``is_read``: by its owner."""
    if is_read:
        read.add(module)
    adapts = isinstance(module._modules.get("base_layer"), nn.Module)
    if adapts:
        read.update(module.modules())
    owns = type(module) not in CONTAINERS
    reads = _reads_weights(type(module)) if owns else is_read
    for child in module._modules.values():
        if child is not None and not adapts:
            _collect(child, reads, read)


_answers: "weakref.WeakKeyDictionary[type, bool]" = weakref.WeakKeyDictionary()


def _reads_weights(kind: Any) -> bool:
    """Whether the forward of a class, or a method that it calls, names ``weight``. fastdiff's own
    do in any layout."""
    if kind not in _answers:
        ours = kind.__module__.startswith(("fastdiff.", "torch."))
        _answers[kind] = not ours and "weight" in names_in_forward(kind)
    return _answers[kind]

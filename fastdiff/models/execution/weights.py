"""A network's weights in the forms in which a program reads them, and programs bound to them."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.execution.bound import Bound
from fastdiff.models.execution.plan import Plan
from fastdiff.models.execution.program import Weight
from fastdiff.ops.arithmetic import arithmetic
from fastdiff.ops.convolution.packed import pack

Tensors = Callable[[nn.Module, str], Sequence[Tensor]]


class Weights:
    """What plans read, made of the parameters once; ``tensors`` answers a layer's parameter, whole
    or in parts one after the other."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._made: dict[tuple[Weight, torch.dtype], Any] = {}
        self._idle: dict[Plan, list[Bound]] = {}  # in no call
        self._lock = threading.Lock()

    @contextmanager
    def bound(self, plan: Plan) -> Iterator[Bound]:
        """The plan on these weights, for one call."""
        with self._lock:
            idle = self._idle.setdefault(plan, [])
            made = idle.pop() if idle else None
            weights = [] if made else [self._in_form(weight, plan.dtype) for weight in plan.weights]
        bound = made or Bound(plan, weights)
        yield bound
        with self._lock:
            idle.append(bound)

    def _in_form(self, weight: Weight, dtype: torch.dtype) -> Any:
        key = (weight, dtype)
        if key not in self._made:
            parts = [p for layer in weight.layers for p in self._tensors(layer, weight.name)]
            self._made[key] = _in_form(weight, [p.detach() for p in parts], dtype)
        return self._made[key]


def _in_form(weight: Weight, parts: Sequence[Tensor], dtype: torch.dtype) -> Any:
    made = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    if weight.form == "vector":
        return made.to(arithmetic(dtype)).contiguous()
    if weight.dims and made.dim() != weight.dims + 2:  # a kernel of one, of any dimension
        made = made.reshape(*made.shape[:2], *(1,) * weight.dims)
    if weight.form == "packed":
        return pack(made, dtype, products=weight.products)
    return made.to(dtype)

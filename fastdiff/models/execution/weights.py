"""A network's weights in the forms in which a program reads them, and programs bound to them."""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdiff.models.execution.bound import Bound
from fastdiff.models.execution.launched import Launched
from fastdiff.models.execution.plan import Plan
from fastdiff.models.execution.program import WIDE, Weight
from fastdiff.ops.arithmetic import arithmetic
from fastdiff.ops.convolution.packed import Packed, pack

_numbers = itertools.count(1)

Tensors = Callable[[nn.Module, str], Sequence[Tensor]]


class Weights:
    """What plans read, made of the parameters once; ``tensors`` answers a layer's parameter, whole
    or in parts one after the other.

    ``number``: of these weights alone; while they have it, no tensor moves that a plan has read.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._tensors, self.number = tensors, next(_numbers)
        self._made: dict[tuple[Weight, torch.dtype], Any] = {}
        self._copies: set[tuple[Weight, torch.dtype]] = set()  # of these, the others are parameters
        self._idle: dict[Plan, list[Bound | Launched]] = {}  # in no call
        self._lock = threading.Lock()

    @contextmanager
    def bound(self, plan: Plan) -> Iterator[Bound | Launched]:
        """The plan on these weights, for one call."""
        with self._lock:
            idle = self._idle.setdefault(plan, [])
            made = idle.pop() if idle else None
            weights = [] if made else [self._in_form(weight, plan.dtype) for weight in plan.weights]
        kind = Launched if plan.captured else Bound
        bound = made or kind(plan, weights)
        yield bound
        with self._lock:
            idle.append(bound)

    def refresh(self) -> bool:
        """Take the values that the parameters have now, where the tensors are; False where one
        would have to move."""
        with self._lock, torch.no_grad():
            for (weight, dtype), kept in self._made.items():
                new = self._anew(weight, dtype)
                if isinstance(new, Packed) or _form(new) != _form(kept):
                    return False
                if (weight, dtype) in self._copies:
                    kept.copy_(new)
                elif new.data_ptr() != kept.data_ptr():
                    return False
        return True

    def _in_form(self, weight: Weight, dtype: torch.dtype) -> Any:
        key = (weight, dtype)
        if key not in self._made:
            with torch.inference_mode(False):  # others refresh them
                made = self._made[key] = self._anew(weight, dtype)
            if not isinstance(made, Packed) and not self._is_parameter(made, weight):
                self._copies.add(key)
        return self._made[key]

    def _anew(self, weight: Weight, dtype: torch.dtype) -> Any:
        made = self._joined(weight.layers, weight.name)
        if weight.form == "vector":
            made = made.to(arithmetic(dtype)).contiguous()
            return self._plus(made, weight) if any(weight.plus) else made
        if weight.dims and made.dim() != weight.dims + 2:  # a kernel of one, of any dimension
            made = made.reshape(*made.shape[:2], *(1,) * weight.dims)
        if weight.form == "packed":
            return pack(made, dtype, products=weight.products, doubled=weight.doubled)
        if weight.form == "wide":
            outs, ins = (max(0, WIDE - n) for n in made.shape[:2])
            made = functional.pad(made, (0, 0, 0, 0, 0, ins, 0, outs))
        last = torch.channels_last if made.dim() == 4 else torch.preserve_format
        return made.to(dtype, memory_format=last)

    def _joined(self, layers: Sequence[nn.Module], name: str) -> Tensor:
        parts = [p.detach() for layer in layers for p in self._tensors(layer, name)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _plus(self, made: Tensor, weight: Weight) -> Tensor:
        """What is added to each layer's part, in a tensor of its own."""
        sizes = [len(self._joined([layer], weight.name)) for layer in weight.layers]
        parts = list(made.clone().split(sizes))
        for part, layer in zip(parts, weight.plus, strict=True):
            if layer is not None:
                part.add_(self._joined([layer], weight.name))
        return torch.cat(parts)

    def _is_parameter(self, made: Tensor, weight: Weight) -> bool:
        """Whether it is a parameter's own memory."""
        parts = (p for layer in weight.layers for p in self._tensors(layer, weight.name))
        return made.data_ptr() in [p.data_ptr() for p in parts]


def _form(made: Tensor) -> tuple[Any, ...]:
    return made.shape, made.stride(), made.dtype, made.device

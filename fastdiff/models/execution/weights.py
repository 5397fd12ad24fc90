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
Key = tuple[Weight, torch.dtype]


class Weights:
    """What plans read, made of the parameters once; ``tensors`` answers a layer's parameter, whole
    or in parts one after the other.

    ``number``: of these weights alone; while they have it, no tensor moves that a captured plan has
    read.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._tensors, self.number = tensors, next(_numbers)
        self._made: dict[Key, Any] = {}
        self._copies: set[Key] = set()  # of these, the others are parameters
        self._fresh: set[Key] = set()  # of these, the others are out of date
        self._current: set[Plan] = set()  # which read fresh ones alone
        self._idle: dict[Plan, list[Bound | Launched]] = {}  # in no call
        self._busy = 0  # calls
        self._taken = self.number  # of the values
        self._lock = threading.Lock()

    @contextmanager
    def bound(self, plan: Plan) -> Iterator[Bound | Launched]:
        """The plan on these weights, for one call."""
        with self._lock:
            if plan not in self._current:
                self._make_current(plan)
            idle = self._idle.setdefault(plan, [])
            kind = Launched if plan.captured else Bound
            made = idle.pop() if idle else kind(plan, [self._made[key] for key in _keys(plan)])
            made.taken = self._taken
            self._busy += 1
        try:
            yield made
        finally:
            with self._lock:
                self._busy -= 1
                idle.append(made)

    def outdate(self) -> bool:
        """Take the parameters' values anew before a plan reads them, where they were packed and not
        elsewhere; False while a call reads."""
        with self._lock:
            if not self._busy:
                self._fresh.clear()
                self._current.clear()
                self._taken = next(_numbers)
            return not self._busy

    def refresh(self) -> bool:
        """Take the values that the parameters have now, where the tensors are; False where one
        would have to move."""
        with self._lock, torch.no_grad():
            return not any(isinstance(made, Packed) for made in self._made.values()) and all(
                map(self._refreshed, self._made)
            )

    @property
    def nbytes(self) -> int:
        """Of the memory that is held beside the parameters."""
        with self._lock:
            packed = [made for made in self._made.values() if isinstance(made, Packed)]
            panels = sum(made.panels.nbytes for made in packed if made.panels is not None)
            copies = sum(self._made[key].nbytes for key in self._copies)
            return panels + copies + sum(plan.nbytes * len(v) for plan, v in self._idle.items())

    def _make_current(self, plan: Plan) -> None:
        """What is out of date, and not for this plan, is given back first."""
        keys = _keys(plan)
        for key in self._made.keys() - self._fresh - set(keys):
            del self._made[key]
            self._copies.discard(key)
        for other in self._idle.keys() - self._current - {plan}:
            del self._idle[other]
        for key in keys:
            if key in self._fresh:
                continue
            if key not in self._made or not self._refreshed(key):
                self._idle.pop(plan, None)  # bound to what was there
                self._make(key)
            self._fresh.add(key)
        self._current.add(plan)

    def _refreshed(self, key: Key) -> bool:
        """Whether it has the parameter's values now, where it is."""
        kept, (weight, dtype) = self._made[key], key
        if isinstance(kept, Packed):
            values = self._whole(weight)
            if (values.shape, values.device) != (kept.weight.shape, kept.weight.device):
                return False
            kept.weight = values
            kept.refresh()
            return True
        new = self._anew(weight, dtype)
        if _form(new) != _form(kept):
            return False
        if key in self._copies:
            kept.copy_(new)
        return key in self._copies or new.data_ptr() == kept.data_ptr()

    def _make(self, key: Key) -> None:
        weight, dtype = key
        with torch.inference_mode(False):  # others refresh them
            made = self._made[key] = self._anew(weight, dtype)
        self._copies.discard(key)
        if not isinstance(made, Packed) and not self._is_parameter(made, weight):
            self._copies.add(key)

    def _anew(self, weight: Weight, dtype: torch.dtype) -> Any:
        made = self._whole(weight)
        if weight.form == "vector":
            made = made.to(arithmetic(dtype)).contiguous()
            return self._plus(made, weight) if any(weight.plus) else made
        if weight.form == "packed":
            return pack(made, dtype, products=weight.products, doubled=weight.doubled)
        if weight.form == "wide":
            outs, ins = (max(0, WIDE - n) for n in made.shape[:2])
            made = functional.pad(made, (0, 0, 0, 0, 0, ins, 0, outs))
        last = torch.channels_last if made.dim() == 4 else torch.preserve_format
        return made.to(dtype, memory_format=last)

    def _whole(self, weight: Weight) -> Tensor:
        made = self._joined(weight.layers, weight.name)
        if weight.dims and made.dim() != weight.dims + 2:  # a kernel of one, of any dimension
            made = made.reshape(*made.shape[:2], *(1,) * weight.dims)
        return made

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


def _keys(plan: Plan) -> list[Key]:
    """What it reads, in its order."""
    return [(weight, plan.dtype) for weight in plan.weights]


def _form(made: Tensor) -> tuple[Any, ...]:
    return made.shape, made.stride(), made.dtype, made.device

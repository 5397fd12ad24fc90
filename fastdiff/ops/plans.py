"""One cache of launch plans: what a kernel is told beside addresses, made once for calls alike."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

LARGEST_CACHE = 2048
_plans: dict[tuple, Any] = {}
_NONE = object()


def described(tensor: Tensor | None) -> tuple | None:
    """All of a tensor that a plan may depend on."""
    if tensor is None:
        return None
    strides = None if tensor.is_contiguous() else tensor.stride()  # the first costs less
    return tensor.shape, strides, tensor.dtype


def plan_of(
    make: Callable[[Any], Any], call: Any, tensors: Sequence[Tensor | None], *options: Any
) -> Any:
    """``make(call)``, remembered by ``options`` and by what ``described`` says of ``tensors``."""
    key = (make, *map(described, tensors), options)
    plan = _plans.get(key, _NONE)
    if plan is _NONE:
        plan = make(call)
        if len(_plans) >= LARGEST_CACHE:
            _plans.clear()
        _plans[key] = plan
    return plan

"""One cache of launch plans: what a kernel is told beside addresses, made once for calls alike."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

LARGEST_CACHE = 2048
_plans: dict[tuple, Any] = {}
_NONE = object()


def plan_of(
    make: Callable[[Any], Any], call: Any, tensors: Sequence[Tensor | None], *options: Any
) -> Any:
    """``make(call)``, remembered by ``options`` and all of ``tensors`` that it may depend on."""
    described = [  # to ask whether it is contiguous costs less than its strides
        v if v is None else (v.shape, None if v.is_contiguous() else v.stride(), v.dtype)
        for v in tensors
    ]
    key = (make, options, *described)
    plan = _plans.get(key, _NONE)
    if plan is _NONE:
        plan = make(call)
        if len(_plans) >= LARGEST_CACHE:
            _plans.clear()
        _plans[key] = plan
    return plan

"""The backends of one operation as contenders: the plan's choice first, then every other."""

from collections.abc import Callable
from typing import Any

import torch

from fastdiff.errors import InputError
from fastdiff.ops import backends
from fastdiff.ops.backends import Choice
from harness.timing import Contender, with_backward


def of_operation(
    call: Callable[..., Any], choose: Callable[[], Choice], x: torch.Tensor
) -> tuple[Contender, list[Contender], str]:
    """(what a user gets, the other backends that can run ``x``, why the plan chose)."""
    backends.set_backend(None)
    choice = choose()
    others = [
        Contender(name, call, backend=name, optional=name != "reference")
        for name in backends.BACKENDS
        if name != choice.backend and _serves(choice.op, name, x.device, x.dtype)
    ]
    return Contender(choice.backend, call), others, choice.reason


def kernels(device: torch.device) -> str:
    """The backend whose kernels serve the device."""
    return backends.default(device, torch.float32)


def _serves(op: str, name: str, device: torch.device, dtype: torch.dtype) -> bool:
    if name == "triton" and device.type == "cpu":
        return False  # its interpreter would be timed
    try:
        backends.require(op, name, device, dtype)
    except InputError:
        return False
    return True


def copy() -> Contender:
    """A copy of the first input; like the operations, it returns a tensor that it allocates."""
    return Contender("copy", lambda x, *_: x.detach().clone())


def compiled(call: Callable[..., Any], *, backward: bool = False) -> Contender:
    """torch.compile of ``call``, for one shape and from scratch."""
    torch._dynamo.reset()
    function = torch.compile(call, dynamic=False)
    return Contender("compiled", with_backward(function) if backward else function, optional=True)

"""Which backend serves a call of a fused operation, and why: one rule for all of them.

torch.func and forward mode get the reference; else the backend that is named serves, or raises,
where it has kernels of the operation at all; else the reference where a gradient is wanted that no
kernel has; else the kernels of the device.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import backends, native
from fastdiff.ops.backends import KERNEL_DTYPES, short

LANGUAGES = {"native": "C++", "triton": "Triton", "cuda": "CUDA C++"}  # of the kernels
NAMED_REASON = f"named by set_backend, backend() or {backends.VARIABLE}"
# Why no kernel can serve a call: the reason for the reference, or against a backend that is named.
TRANSFORMS = "only 'reference' serves torch.func and forward-mode differentiation"
NO_GRADIENTS = "only 'reference' has gradients and a tensor requires one (use torch.no_grad())"

# (operation, GPU's name) where benchmarks/results has the CUDA C++ kernel faster than Triton's, in
# the geometric mean over the cases; tests/ops/test_cuda_plan.py holds the two together. No GPU has
# been measured yet.
FASTER_IN_CUDA: frozenset[tuple[str, str]] = frozenset()


class Choice(NamedTuple):
    """What runs for one call of an operation, and why."""

    op: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.backend} ({self.reason})"


@dataclass(eq=False)
class Operation:
    """A fused operation: the backends beside the reference that have kernels of it, and
    ``choose``, which takes the operation's own arguments, the first an x or its like. Where none is
    given, its kernels have no gradients."""

    name: str
    kernels: tuple[str, ...]
    choose: Any = None

    def __post_init__(self) -> None:
        self.choose = self.choose or self._without_gradients
        self.named = {v: Choice(self.name, v, NAMED_REASON) for v in backends.BACKENDS}
        self.on_cpu = Choice(self.name, "reference", no_kernel(self, "native"))
        if "native" in self.kernels:
            self.on_cpu = Choice(self.name, "native", "the C++ kernel serves every CPU call")

    def _without_gradients(self, x: Tensor, *others: Any, **named: Any) -> Choice:
        wanted = wants_gradient(x, *others) or wants_gradient(*named.values())
        return choose(self, x, NO_GRADIENTS if wanted else "")


OPERATIONS: dict[str, Operation] = {}  # by name; each op.py adds its own


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Print, and return, which backend would serve ``op(*args, **kwargs)`` now and why.

    ``op`` is one of ``fastdiff.ops`` or its name: ``explain("attention", qkv, 4)``. Nothing is
    computed. Raises InputError for an unknown operation and for a named backend that cannot serve.
    For what ``accelerate`` did to a model see ``fastdiff.report``.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPERATIONS:
        raise InputError(f"op is {name!r}; expected one of {', '.join(OPERATIONS)}")
    choice = OPERATIONS[name].choose(*args, **kwargs)
    print(choice)
    return choice


def choose(
    op: Operation, x: Tensor, missing: str = "", rule: Callable[[], tuple[str, str]] | None = None
) -> Choice:
    """The backend for a call on ``x``; ``missing``: what it wants and no kernel has; ``rule`` gives
    (backend, reason) in place of ``default``.

    Raises InputError where the backend that is named has kernels of ``op`` and cannot serve.
    """
    name = backends.named()
    if backends.transforms():
        missing = TRANSFORMS
    if name is not None and (name == "reference" or name in op.kernels):
        require(op, name, x.device, x.dtype, missing)
        return op.named[name]
    if missing:
        backend, reason = "reference", missing
    elif rule is None and name is None and x.is_cpu and x.dtype in KERNEL_DTYPES:
        return op.on_cpu  # as ``default`` says, at half the cost
    else:
        backend, reason = rule() if rule else default(op, x.device, x.dtype)
    if name is not None:  # a whole network runs by a backend that has kernels of some operations
        reason = f"{name!r} was named, {no_kernel(op, name)}: {reason}"
    return Choice(op.name, backend, reason)


def no_kernel(op: Operation, name: str) -> str:
    return f"there is no {LANGUAGES[name]} kernel of {op.name}"


def default(op: Operation, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(backend, reason): the kernels of the device, CUDA C++ where it is measured faster."""
    if dtype not in KERNEL_DTYPES:
        return "reference", f"the kernels take float32, bfloat16 and float16, not {short(dtype)}"
    kind = device.type
    if kind == "cpu":
        return op.on_cpu[1:]
    if kind != "cuda":
        return "reference", f"there are no kernels for {kind} devices"
    if "triton" not in op.kernels and "cuda" not in op.kernels:
        return "reference", f"there is no kernel of {op.name} for GPUs"
    triton = backends.HAS_TRITON and "triton" in op.kernels
    if "cuda" in op.kernels and (not triton or faster_in_cuda(op.name, device)):
        if not native.cuda_problem(device):
            why = "measured faster than Triton's" if triton else "Triton is not installed"
            return "cuda", f"the CUDA C++ kernel serves this GPU: {why}"
    if triton:
        return "triton", "the Triton kernel serves GPUs"
    return "reference", "Triton is not installed"


@functools.cache
def faster_in_cuda(op: str, device: torch.device) -> bool:
    """Whether the CUDA C++ kernel of ``op`` is measured faster than Triton's on this GPU."""
    return bool(FASTER_IN_CUDA) and (op, torch.cuda.get_device_name(device)) in FASTER_IN_CUDA


def require(
    op: Operation, name: str, device: torch.device, dtype: torch.dtype, missing: str = ""
) -> None:
    """InputError where the backend ``name`` has not got what ``missing`` says, or cannot serve such
    a tensor of ``op``."""
    why = (name != "reference" and missing) or problem(op, name, device, dtype)
    if why:
        raise InputError(
            f"{op.name}: the backend {name!r} was named, but {why}; name another, or None for the "
            "plan's choice"
        )


def problem(op: Operation, name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why the backend ``name`` cannot serve such a tensor of ``op``, in words; "" where it can."""
    kind = device.type
    if name == "reference":
        return ""
    if name not in op.kernels:
        return no_kernel(op, name)
    if dtype not in KERNEL_DTYPES:
        return f"its kernels take float32, bfloat16 and float16, not {short(dtype)}"
    if name == "cuda":
        return native.cuda_problem(device)
    if name == "native":
        return "" if kind == "cpu" else f"it runs on the CPU, not on {kind}"
    if not backends.HAS_TRITON:
        return "the package triton is not installed"
    interprets = kind == "cpu" and os.environ.get("TRITON_INTERPRET", "0") == "1"
    if kind == "cuda" or interprets:  # Triton's interpreter takes CPU tensors
        return ""
    return f"it runs on CUDA devices, not on {kind}"


def wants_gradient(*arguments: Any) -> bool:
    """Whether autograd will ask for a gradient of one of them, as far as they are tensors."""
    if torch.is_grad_enabled():
        for argument in arguments:  # half the time of any(); isinstance(None, Tensor) is slow
            if argument is not None and isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False

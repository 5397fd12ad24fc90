"""Which backend serves a call of a fused operation, and why: one rule for all of them.

torch.func and forward mode get the reference; else the backend that is named serves, or raises;
else the reference where a gradient is wanted that no kernel has; else the kernels of the device.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import backends, native
from fastdiff.ops.backends import KERNEL_DTYPES, short

NAMED_REASON = f"named by set_backend, backend() or {backends.VARIABLE}"
TRANSFORMS_REASON = "only plain PyTorch serves torch.func and forward-mode differentiation"

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


class MissingGradient(NamedTuple):
    """A gradient that a call wants and no kernel has: why the reference serves it, and what is
    wrong with another backend that is named."""

    reason: str
    problem: str


NOT_DIFFERENTIABLE = MissingGradient(
    "only it is differentiable, and a gradient is wanted",
    "its kernel has no gradients and a tensor requires grad; use torch.no_grad(), or name "
    "'reference'",
)


@dataclass(frozen=True)
class Operation:
    """A fused operation: the backends beside the reference that have kernels of it, and
    ``choose``, which takes the operation's own arguments."""

    name: str
    kernels: tuple[str, ...]
    choose: Callable[..., Choice]


OPERATIONS: dict[str, Operation] = {}


def register(name: str, choose: Callable[..., Choice], *, kernels: tuple[str, ...]) -> Operation:
    """Each operation's op.py calls this; ``explain`` and the benchmarks find it by its name."""
    OPERATIONS[name] = Operation(name, kernels, choose)
    return OPERATIONS[name]


def choose(
    op: Operation,
    x: Tensor,
    missing: MissingGradient | None = None,
    rule: Callable[[], tuple[str, str]] | None = None,
) -> Choice:
    """The backend for a call on ``x``; ``missing``: a gradient it wants and no kernel has; ``rule``
    gives (backend, reason) in place of ``default``.

    Raises InputError where the backend that is named cannot serve.
    """
    name = backends.named()
    if backends.transforms():
        refuse_under_transforms(op.name)
        return Choice(op.name, "reference", TRANSFORMS_REASON)
    if name is None:
        if missing is not None:
            return Choice(op.name, "reference", missing.reason)
        return Choice(op.name, *(rule() if rule else default(op, x.device, x.dtype)))
    if missing is not None and name != "reference":
        raise InputError(f"{op.name}: the backend {name!r} was named, but {missing.problem}")
    require(op, name, x.device, x.dtype)
    return Choice(op.name, name, NAMED_REASON)


def refuse_under_transforms(op: str) -> None:
    """InputError where a backend is named that torch.func and forward mode cannot use."""
    if backends.named() not in (None, "reference"):
        raise InputError(
            f"{op}: the backend {backends.named()!r} was named, but only 'reference' serves "
            "torch.func and forward-mode differentiation; name that, or None for the plan's choice"
        )


def default(op: Operation, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(backend, reason): the kernels of the device, CUDA C++ where it is measured faster."""
    if dtype not in KERNEL_DTYPES:
        return "reference", f"the kernels take float32, bfloat16 and float16, not {short(dtype)}"
    kind = device.type
    if kind == "cpu":
        return "native", "the C++ kernel serves every CPU call"
    if kind != "cuda":
        return "reference", f"there are no kernels for {kind} devices"
    triton = backends.HAS_TRITON
    if "cuda" in op.kernels and (not triton or faster_in_cuda(op.name, device)):
        if native.cuda_serves(device):
            why = "measured faster than Triton's" if triton else "Triton is not installed"
            return "cuda", f"the CUDA C++ kernel serves this GPU: {why}"
    if triton:
        return "triton", "the Triton kernel serves GPUs"
    return "reference", "Triton is not installed"


@functools.cache
def faster_in_cuda(op: str, device: torch.device) -> bool:
    """Whether the CUDA C++ kernel of ``op`` is measured faster than Triton's on this GPU."""
    return bool(FASTER_IN_CUDA) and (op, torch.cuda.get_device_name(device)) in FASTER_IN_CUDA


def require(op: Operation, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """InputError where the kernel of ``op`` in the backend ``name`` cannot serve such a tensor."""
    if name == "reference":
        return
    kind = device.type
    if name == "cuda" and name not in op.kernels:
        problem = f"there is no CUDA C++ kernel of {op.name}"
    elif dtype not in KERNEL_DTYPES:
        problem = f"its kernels take float32, bfloat16 and float16, not {short(dtype)}"
    elif name == "cuda":
        problem = native.cuda_problem(device)
    elif name == "native":
        problem = "" if kind == "cpu" else f"it runs on the CPU, not on {kind}"
    elif not backends.HAS_TRITON:
        problem = "the package triton is not installed"
    elif kind == "cuda" or (kind == "cpu" and triton_interprets()):
        problem = ""
    else:
        problem = f"it runs on CUDA devices, not on {kind}"
    if problem:
        raise InputError(
            f"{op.name}: the backend {name!r} was named, but {problem}; name another, or None for "
            "the plan's choice"
        )


def triton_interprets() -> bool:
    """Whether Triton kernels run in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of one of them."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # half the time of any()
            if tensor is not None and tensor.requires_grad:
                return True
    return False

"""Which implementation serves a fused operation: the one named here, or the plan's choice.

``"reference"`` is plain PyTorch and serves everything; ``"native"`` are the C++ kernels for the
CPU; ``"triton"`` and ``"cuda"`` the kernels for NVIDIA GPUs. Nothing is named at the start, unless
the environment's ``FASTDIFF_BACKEND`` does: each operation's plan then chooses, a pure function of
shape, dtype and device. A named backend that cannot serve a call raises; only the plan may choose
another.
"""

import contextlib
import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from fastdiff.errors import InputError
from fastdiff.ops import native

BACKENDS = ("reference", "native", "triton", "cuda")
VARIABLE = "FASTDIFF_BACKEND"
CUDA_OPERATIONS = ("group_norm_silu", "posterior_step", "q_sample")  # those of csrc/cuda
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMED_REASON = f"named by set_backend, backend() or {VARIABLE}"
TRANSFORMS_REASON = "only plain PyTorch serves torch.func and forward-mode differentiation"
HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Choice:
    """What runs for one call of an operation, and why."""

    op: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.backend} ({self.reason})"


def _checked(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise InputError(f"{source} is {name!r}; expected one of {', '.join(BACKENDS)} or None")
    return name


_named: str | None = _checked(os.environ.get(VARIABLE) or None, VARIABLE)


# What is named outside of all blocks, then in the blocks that have not ended yet. Blocks of several
# threads end in any order; the one that began last counts.
_blocks: list[list[str | None]] = [[_named]]
_lock = threading.Lock()


def set_backend(name: str | None) -> None:
    """Name the backend of every fused operation in this process; None lets the plans choose.

    ``name``: "reference", "native", "triton" or "cuda". Raises InputError for another.
    """
    global _named
    with _lock:
        _named = _blocks[-1][0] = _checked(name, "backend")


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """``set_backend(name)`` for the length of a ``with`` block, in every thread of the process.

    Raises InputError for an unknown name.
    """
    global _named
    block = [_checked(name, "backend")]
    with _lock:
        _blocks.append(block)
        _named = block[0]
    try:
        yield
    finally:
        with _lock:
            _blocks[:] = [other for other in _blocks if other is not block]
            _named = _blocks[-1][0]


def named() -> str | None:
    """The backend that is named, or None where the plans choose."""
    return _named


def default(device: torch.device, dtype: torch.dtype, op: str = "") -> str:
    """The plan: the kernels of the device, those in CUDA C++ where they are measured faster."""
    if dtype in KERNEL_DTYPES:
        if device.type == "cpu":
            return "native"
        if device.type == "cuda":
            if op in CUDA_OPERATIONS and (not HAS_TRITON or faster_in_cuda(op, device)):
                if native.cuda_serves(device):
                    return "cuda"
            if HAS_TRITON:
                return "triton"
    return "reference"


def default_reason(device: torch.device, dtype: torch.dtype, op: str = "") -> str:
    """Why ``default`` answers as it does, in words."""
    if dtype not in KERNEL_DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {short(dtype)}"
    if device.type == "cpu":
        return "the C++ kernel serves every CPU call"
    if device.type == "cuda":
        if default(device, dtype, op) == "cuda":
            why = "measured faster than Triton's" if HAS_TRITON else "Triton is not installed"
            return f"the CUDA C++ kernel serves this GPU: {why}"
        return "the Triton kernel serves GPUs" if HAS_TRITON else "Triton is not installed"
    return f"there are no kernels for {device.type} devices"


# (operation, GPU's name) where benchmarks/results has the CUDA C++ kernel faster than Triton's, in
# the geometric mean over the cases; tests/ops/test_cuda_plan.py holds the two together. No GPU has
# been measured yet.
FASTER_IN_CUDA: frozenset[tuple[str, str]] = frozenset()


@functools.cache
def faster_in_cuda(op: str, device: torch.device) -> bool:
    """Whether the CUDA C++ kernel of ``op`` is measured faster than Triton's on this GPU."""
    return bool(FASTER_IN_CUDA) and (op, torch.cuda.get_device_name(device)) in FASTER_IN_CUDA


def require(op: str, name: str, device: torch.device, dtype: torch.dtype) -> str:
    """``name``, or InputError where that backend's kernel of ``op`` cannot serve such a tensor."""
    device_type = device.type
    if name == "reference":
        return name
    if name == "cuda" and op not in CUDA_OPERATIONS:
        problem = f"there is no CUDA C++ kernel of {op}"
    elif dtype not in KERNEL_DTYPES:
        problem = f"its kernels take float32, bfloat16 and float16, not {short(dtype)}"
    elif name == "cuda":
        problem = native.cuda_problem(device)
    elif name == "native":
        problem = "" if device_type == "cpu" else f"it runs on the CPU, not on {device_type}"
    elif not HAS_TRITON:
        problem = "the package triton is not installed"
    elif device_type == "cuda" or (device_type == "cpu" and triton_interprets()):
        problem = ""
    else:
        problem = f"it runs on CUDA devices, not on {device_type}"
    if problem:
        raise InputError(
            f"{op}: the backend {name!r} was named, but {problem}; name another, or None for the "
            "plan's choice"
        )
    return name


def under_transforms(op: str) -> str:
    """The backend that serves torch.func and forward mode; InputError where another is named."""
    if _named not in (None, "reference"):
        raise InputError(
            f"{op}: the backend {_named!r} was named, but only 'reference' serves torch.func and "
            "forward-mode differentiation; name that, or None for the plan's choice"
        )
    return "reference"


def triton_interprets() -> bool:
    """Whether Triton kernels run in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """CUDA kernels are launched on the current device: make that the tensor's."""
    if x.device.type != "cuda" or torch.cuda.current_device() == x.device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _always(*_: object) -> bool:
    return True


def _private(path: str) -> Callable[..., Any]:
    """A function of torch._C that no public one replaces; where it is gone, one that says yes."""
    found: Any = torch._C
    for name in path.split("."):
        found = getattr(found, name, None)
    return found or _always


_LISTENERS = (
    torch.compiler.is_compiling,
    torch.jit.is_tracing,
    _private("_len_torch_dispatch_stack"),  # FakeTensorMode, make_fx, flop counters, …
    _private("_are_functorch_transforms_active"),  # torch.func
    _private("_autograd._profiler_enabled"),
)
_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))


_transforming = _private("_are_functorch_transforms_active")
_is_batched = _private("_functorch.is_legacy_batchedtensor")


def forward_mode() -> bool:
    """Whether forward-mode derivatives are taken: through a kernel they would be lost unsaid."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def transforms() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which only plain PyTorch
    follows."""
    return _transforming() or forward_mode()


def nobody_listens() -> bool:
    """Whether no compiler, transform, mode, profiler or forward-mode derivative wants to know of a
    call. A kernel may then be launched past PyTorch's dispatcher, which halves the call's cost."""
    for listener in _LISTENERS:
        if listener():
            return False
    return not forward_mode()


def launches_directly(*arguments: torch.Tensor | None) -> bool:
    """``nobody_listens``, and all arguments are plain tensors or None."""
    if not nobody_listens():
        return False
    for argument in arguments:
        if type(argument) not in _PLAIN:
            return False
    return True


def launches_backward_directly(dy: torch.Tensor) -> bool:
    """``launches_directly`` for an incoming gradient, which ``is_grads_batched`` makes a batch."""
    return launches_directly(dy) and not _is_batched(dy)

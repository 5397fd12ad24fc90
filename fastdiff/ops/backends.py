"""Which implementation serves a fused operation: the one named here, or the plan's choice.

``"reference"`` is plain PyTorch and serves everything; ``"native"`` are the C++ kernels for the
CPU; ``"triton"`` and ``"cuda"`` the kernels for NVIDIA GPUs. Nothing is named at the start, unless
the environment's ``FASTDIFF_BACKEND`` does: each operation's plan then chooses, a pure function of
shape, dtype and device. It chooses too for an operation of which the named backend has no kernels;
where that one has them and cannot serve a call, the call raises.
"""

import contextlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import forward_ad

from fastdiff.errors import InputError

BACKENDS = ("reference", "native", "triton", "cuda")
VARIABLE = "FASTDIFF_BACKEND"
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_TRITON = importlib.util.find_spec("triton") is not None


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

    ``name``: "reference", "native", "triton" or "cuda". Raises InputError for another. The plans
    choose too for an operation of which it has no kernels ("cuda": attention, rms_norm_silu).
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


_HERE = contextlib.nullcontext()


def device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """CUDA kernels are launched on the current device: make that the tensor's."""
    if not x.is_cuda or torch.cuda.current_device() == x.device.index:
        return _HERE
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


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_traced = _private("_is_tracing")  # by torch.jit.trace
_modes = _private("_len_torch_dispatch_stack")  # FakeTensorMode, make_fx, flop counters, …
_profiled = _private("_autograd._profiler_enabled")
_transforming = _private("_are_functorch_transforms_active")  # torch.func
_is_batched = _private("_functorch.is_legacy_batchedtensor")


def transforms() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which only plain PyTorch
    follows: through a kernel their derivatives would be lost unsaid."""
    return _transforming() or getattr(forward_ad, "_current_level", 0) >= 0


def nobody_listens() -> bool:
    """Whether no compiler, transform, mode, profiler or forward-mode derivative wants to know of a
    call. A kernel may then be launched past PyTorch's dispatcher, which halves the call's cost."""
    compiling = torch.compiler.is_compiling()
    return not (compiling or _traced() or _modes() or transforms() or _profiled())


def launches_directly(*arguments: torch.Tensor | None) -> bool:
    """``nobody_listens``, and all arguments are plain tensors or None."""
    if not nobody_listens():
        return False
    for argument in arguments:
        if argument is not None and type(argument) not in _PLAIN:
            return False
    return True


def launches_backward_directly(dy: torch.Tensor) -> bool:
    """``launches_directly`` for an incoming gradient, which ``is_grads_batched`` makes a batch."""
    return launches_directly(dy) and not _is_batched(dy)

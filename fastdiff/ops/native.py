"""Loads the native library, picks its instruction set, and says what it can serve."""

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch  # before the library: its OpenMP runtime is the one the library calls

from fastdiff.errors import InputError

INTERFACE = 9  # kInterface of csrc/bindings/module.cpp
ISA_VARIABLE = "FASTDIFF_ISA"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType of csrc/common


F = TypeVar("F", bound=Callable[..., Any])


def constant_when_compiled(function: F) -> F:
    """``torch.compiler.assume_constant_result``, which imports all of torch._dynamo (2 s, as long
    as torch itself) to set one attribute: set here, where the version is known to read it."""
    if tuple(map(int, torch.__version__.split(".")[:2])) > (2, 14):
        return torch.compiler.assume_constant_result(function)
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class NativeLibraryError(OSError):
    """The native library is missing, unloadable, or built from other sources."""


@functools.cache
def library() -> Any:
    """The native module (csrc/bindings), set to the best instruction set this CPU runs.

    ``FASTDIFF_ISA`` (baseline, avx2 or avx512) forces one. Raises NativeLibraryError when the
    module cannot be used and InputError when the forced instruction set cannot.
    """
    try:
        module = importlib.import_module("fastdiff._native")
    except ImportError as error:
        raise NativeLibraryError(
            f"fastdiff's native library cannot be loaded ({error}): reinstall fastdiff with "
            "'pip install --force-reinstall --no-deps fastdiff', or 'pip install -e .' in a clone"
        ) from error
    found = getattr(module, "INTERFACE", None)
    if found != INTERFACE:
        raise NativeLibraryError(
            f"fastdiff's native library has interface {found}, this fastdiff expects {INTERFACE}: "
            "it was built from other sources; run 'pip install' again"
        )
    module.set_isa(choose_isa(os.environ.get(ISA_VARIABLE, ""), module.supported_isas()))
    return module


def choose_isa(forced: str, supported: list[str]) -> str:
    """The name ``forced`` if it is given, else the last and fastest of ``supported``."""
    if not forced:
        return supported[-1]
    if forced not in supported:
        raise InputError(
            f"{ISA_VARIABLE} is {forced!r}, but this CPU and build run only "
            f"{', '.join(supported)}: name one of these or unset it"
        )
    return forced


def build_info() -> dict[str, Any]:
    """What the library was compiled with: compiler, isas, openmp, cuda, cuda_archs, sanitize."""
    return library().build_info()


def cuda_driver_version() -> int:
    """The newest CUDA the driver serves, as 1000·major + 10·minor; 0 without driver or kernels."""
    return library().cuda_driver_version() if build_info()["cuda"] is not None else 0


def emulates_cuda() -> bool:
    """Whether the CUDA kernels were built for the CPU (FASTDIFF_CUDA=emulate), for tests."""
    return build_info()["cuda_archs"] == "emulated"


def cuda_serves(device: torch.device) -> bool:
    """Whether the compiled CUDA kernels run on ``device``."""
    return not cuda_problem(device)


@constant_when_compiled  # torch.compile cannot look into the library
def cuda_problem(device: torch.device) -> str:
    """Why the compiled CUDA kernels do not run on ``device``, in words; "" where they do."""
    return _cuda_problem(device)


@functools.cache
def _cuda_problem(device: torch.device) -> str:
    info = build_info()
    if info["cuda"] is None:
        return "the native library was built without CUDA kernels (FASTDIFF_CUDA=1 compiles them)"
    if emulates_cuda():
        return "" if device.type == "cpu" else "it was built for the emulation on CPU tensors"
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    if not driver_serves(info["cuda"], cuda_driver_version()):
        return f"the driver does not serve CUDA {info['cuda'] // 1000}, which it was built with"
    major, minor = capability = torch.cuda.get_device_capability(device)
    if not archs_serve(info["cuda_archs"].split(), capability):
        return f"it was built for {info['cuda_archs']}, not for compute capability {major}.{minor}"
    return ""


def cuda_limits(device: torch.device) -> tuple[int, int, int, int]:
    """What CUDA launches can have: multiprocessors, bytes of shared memory to a block, blocks to a
    cluster, bytes of L2."""
    return library().cuda_limits(device.index or 0) if device.type == "cpu" else _limits(device)


@functools.cache
def _limits(device: torch.device) -> tuple[int, int, int, int]:
    with torch.cuda.device(device):
        return library().cuda_limits(device.index)


def multiprocessors(device: torch.device) -> int:
    """How many a grid is made for; in the emulation few, so that kernels stride over their work."""
    return cuda_limits(device)[0]


def code(tensor: torch.Tensor | None) -> int:
    """The dtype's number in csrc/common/dtype.h."""
    return 0 if tensor is None else DTYPE_CODES[tensor.dtype]


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def launch(name: str, backend: str, x: torch.Tensor, *arguments: Any) -> Any:
    """The library's kernel ``name``: the CPU's in torch's threads, CUDA's on x's current stream."""
    if backend == "native":
        return getattr(library(), name + "_cpu")(*arguments, torch.get_num_threads())
    return getattr(library(), name + "_cuda")(*arguments, cuda_stream(x.device))


def launch_on(name: str, backend: str, plan: Any, tensors: Any, *numbers: Any) -> Any:
    """``launch`` by a plan with ``tensors``, the first of which is there; CUDA's grid strides."""
    if backend == "cuda":
        numbers = *numbers, multiprocessors(tensors[0].device)
    # As ``address`` says, without a call for each.
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    return launch(name, backend, tensors[0], plan, *addresses, *numbers)


# Scratch memory that no call uses now: a fresh one may come from the system page by page, zeroed,
# which was measured to cost a tenth of a call. A list's pop and append are atomic.
_IDLE: list[torch.Tensor] = []
_KEPT_FLOATS = 1 << 23  # 32 MiB; what is larger goes back


def borrow(floats: int) -> torch.Tensor:
    """Scratch memory on the CPU."""
    try:
        workspace = _IDLE.pop()
    except IndexError:
        return torch.empty(floats, dtype=torch.float32)
    return workspace if workspace.numel() >= floats else torch.empty(floats, dtype=torch.float32)


def give_back(workspace: torch.Tensor) -> None:
    """For the next to borrow."""
    if workspace.numel() <= _KEPT_FLOATS:
        _IDLE.append(workspace)


def in_threads(run: Callable[[int, int], Any], floats: Callable[[int], int]) -> Callable[[], None]:
    """``run(workspace, threads)`` in torch's threads, again and again; ``floats(threads)``: of its
    workspace, asked for where the number of threads has changed. It serves one call at a time."""
    size = sized_for = 0

    def runs() -> None:
        nonlocal size, sized_for
        threads = torch.get_num_threads()
        if threads != sized_for:
            size, sized_for = floats(threads), threads
        workspace = borrow(size)
        run(workspace.data_ptr(), threads)
        give_back(workspace)

    return runs


def cuda_stream(device: torch.device) -> int:
    """The address of the device's current stream; 0, the default stream, in the emulation."""
    if device.type != "cuda":
        return 0
    if _raw_stream is not None:
        return _raw_stream(device.index)
    return torch.cuda.current_stream(device).cuda_stream


# A tenth of the public call's time, and what Triton's launcher calls too.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def driver_serves(runtime: int, driver: int) -> bool:
    """A driver runs every CUDA runtime of its major version or an older one."""
    return driver // 1000 >= runtime // 1000


def archs_serve(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether code compiled for ``archs`` ("80-real", "90a-real", "100", "90-virtual") runs on
    a device of compute capability ``capability``.

    Machine code runs on its major version from its minor version on, that of an "a" architecture
    on exactly its own, and PTX (no suffix, or "-virtual") on everything that is not older.
    """
    for arch in archs:
        name, _, kind = arch.partition("-")
        number = int(name.rstrip("af"))
        own = (number // 10, number % 10)
        if name.endswith("a"):
            if own == capability:
                return True
            continue
        same_major = own[0] == capability[0] and own[1] <= capability[1]
        if (kind != "virtual" and same_major) or (kind != "real" and own <= capability):
            return True
    return False

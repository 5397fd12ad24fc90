"""What the tests of Triton kernels share: compiling what a launcher launches, and counting what it
would compile, without a GPU."""

import contextlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import (
    JITFunction,
    compute_cache_key,
    create_function_from_signature,
)

CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"


class Usage(NamedTuple):
    """What one compiled kernel takes, as cuobjdump reads it off the machine code."""

    kernel: str
    registers: int
    stack: int  # bytes; a spill needs stack
    spills: int  # local loads and stores in the machine code
    shared: int
    warps: int


@contextlib.contextmanager
def compiling(capability: int, cache: str | Path):
    """Within: a launch compiles for ``capability`` instead of running, and notes its usage.

    Yields the list of usages. Call the launcher with tensors on device "meta": their pointers
    count as aligned. ``cache`` is a folder of the test's own.
    """
    usages: list[Usage] = []

    def compile_source(source: ASTSource, target: GPUTarget, options: dict) -> None:
        usages.append(usage(triton.compile(source, target=target, options=options), cache))

    with meeting_new_kernels(capability, compile_source):
        yield usages


@contextlib.contextmanager
def counting(capability: int = 90):
    """Within: a launch compiles and runs nothing; yields the list of the kernels that would have
    been compiled. Tensors on device "meta", as above."""
    kernels: list[str] = []
    with meeting_new_kernels(capability, lambda source, *_: kernels.append(source.name)):
        yield kernels


@contextlib.contextmanager
def meeting_new_kernels(capability: int, meet: Callable):
    """Within: a launch calls ``meet(source, target, options)`` if Triton's cache, by its own key,
    would not have the kernel; and does nothing else."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    binders: dict[JITFunction, Callable] = {}
    seen = set()

    def run(self, *args, grid, warmup, **kwargs):
        if self not in binders:
            binders[self] = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binders[self](*args, **kwargs)
        key = (self.fn.__qualname__, compute_cache_key({}, specialization, options))
        if key in seen:
            return
        seen.add(key)
        _, signature, constants, attributes = self._pack_args(
            backend, kwargs, bound, specialization, options
        )
        meet(ASTSource(self, signature, constants, attributes), target, options)

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original


def usage(compiled, cache: str | Path) -> Usage:
    cubin = Path(cache) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    report = _cuobjdump("-res-usage", cubin)
    code = _cuobjdump("-sass", cubin)
    registers, stack = (int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK"))
    return Usage(
        compiled.metadata.name,
        registers,
        stack,
        len(re.findall(r"\b(?:LDL|STL)\b", code)),
        compiled.metadata.shared,
        compiled.metadata.num_warps,
    )


def _cuobjdump(option: str, cubin: Path) -> str:
    return subprocess.run(
        [str(CUOBJDUMP), option, str(cubin)], capture_output=True, text=True, check=True
    ).stdout


SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program can have


def report(capability: int, taken: dict[str, list[Usage]], spills: int = 0) -> None:
    """Print what the kernels of each case take (pytest -s); assert that all fit.

    spills: how many local loads and stores a kernel may have. ptxas stores a few values where one
    more program then fits a multiprocessor, and a tile that only just fits is still read once.
    """
    wrong = []
    for case, usages in taken.items():
        assert usages
        for use in usages:
            line = (
                f"sm_{capability} {case} {use.kernel}: {use.registers} registers, "
                f"{use.spills} spills, {use.shared} bytes shared, {use.warps} warps"
            )
            print(line)
            fits = use.shared <= SHARED_MEMORY[capability] and use.registers * use.warps <= 2048
            if not fits or use.spills > spills:
                wrong.append(line)
    assert not wrong, wrong

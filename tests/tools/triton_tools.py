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
    mangle_type,
)

CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


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
    seen = set()
    usages: list[Usage] = []

    def run(self, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        source = specialised(self, args, kwargs)
        key = (source.hash(), str(options))
        if key in seen:
            return
        seen.add(key)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        usages.append(usage(compiled, cache))

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield usages
    finally:
        JITFunction.run = original


@contextlib.contextmanager
def counting(capability: int = 90):
    """Within: a launch compiles and runs nothing; yields the set of (kernel, Triton's cache key),
    one for each kernel that would have been compiled. Tensors on device "meta", as above."""
    backend = make_backend(GPUTarget("cuda", capability, 32))
    keys: set[tuple[str, str]] = set()
    binders: dict[str, Callable] = {}

    def run(self, *args, grid, warmup, **kwargs):
        name = self.fn.__qualname__
        if name not in binders:
            binders[name] = create_function_from_signature(self.signature, self.params, backend)
        _, specialization, options = binders[name](*args, **kwargs)
        keys.add((name, compute_cache_key({}, specialization, options)))

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield keys
    finally:
        JITFunction.run = original


def specialised(kernel: JITFunction, args: tuple, kwargs: dict) -> ASTSource:
    """The source as Triton's launcher specialises it: ones and None constant, 16 | n noted."""
    bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}

    def note(path: tuple, value):
        """The type of one argument, which may be a tuple."""
        if isinstance(value, tuple):
            return tuple(note((*path, i), entry) for i, entry in enumerate(value))
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if kernel.params[path[0]].is_constexpr or value is None or (is_int and value == 1):
            constants[path] = value
            return "constexpr"
        number = value if is_int else value.data_ptr() if hasattr(value, "data_ptr") else 1
        if number % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return mangle_type(value)

    for index, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        signature[parameter.name] = note(
            (index,), tuple(value) if isinstance(value, tuple) else value
        )
    return ASTSource(kernel, signature, constants, attributes)


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

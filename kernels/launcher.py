"""Launches of Triton kernels past its binder, whose host time is more than all else of a call.

At every launch ``kernel[grid](...)`` finds out what its kernels are specialised by: the type of
each argument, which addresses and integers 16 divides, which integers are 1. Here what stays from
call to call is given once, and a key is made of the rest. A key that was seen before goes straight
to the launcher of the kernel that Triton compiled for it. The first call with a key is Triton's
own, and so is every one where it does more than launch: in the interpreter, with hooks, in its
modes for debugging and instrumenting, and in a version that is not known here.
"""

from typing import Any

import triton
from triton import runtime
from triton.runtime.jit import JITFunction

VERSIONS = (3, 6), (3, 9)  # the first and the last of Triton whose launchers are known here
KNOWN = VERSIONS[0] <= tuple(map(int, triton.__version__.split(".")[:2])) <= VERSIONS[1]
LARGEST_CACHE = 2048
_run = JITFunction.run


class Launch:
    """A kernel on a grid, with the arguments that stay: called with those that change.

    A kernel takes what changes first (tensors, None and integers), then ``numbers``, then its
    constexprs, by name; Triton's options are among ``constants`` too. It runs on the current device
    and stream. No pointer is checked, but by the first call of a kind.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: Any, **constants: Any) -> None:
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants
        self.programs = (*grid, 1, 1)[:3]
        self.found: dict[tuple, tuple] = {}

    def __call__(self, *changing: Any) -> None:
        if not _only_launches(self.kernel):
            self.kernel[self.grid](*changing, *self.numbers, **self.constants)
            return
        driver = runtime.driver.active
        device = driver.get_current_device()
        key, values = _specialised(device, changing)
        found = self.found.get(key)
        if found is None:
            compiled = self.kernel[self.grid](*changing, *self.numbers, **self.constants)
            if _is_known(compiled):
                self.found[key] = self._found(compiled, len(changing))
            return
        run, function, metadata, rest = found
        stream = driver.get_current_stream(device)
        run(*self.programs, stream, function, metadata, None, None, None, *values, *rest)

    def _found(self, compiled: Any, changing: int) -> tuple:
        """What a launch of ``compiled`` takes beside the stream and what changes."""
        names = self.kernel.arg_names[changing + len(self.numbers) :]
        rest = *self.numbers, *(self.constants[name] for name in names)
        return compiled.run, compiled.function, compiled.packed_metadata, rest


def _specialised(device: int, values: tuple) -> tuple[tuple, list]:
    """What Triton specialises by, or more, and the values, with addresses for tensors."""
    kinds: list[Any] = [device]
    given: list[Any] = []
    addresses = 0
    try:
        for value in values:
            if value is None:
                kinds.append(None)
            elif type(value) is int:
                kind = 1 if value == 1 else 16 if value % 16 == 0 else 0
                narrow = -(2**31) <= value < 2**31
                kinds.append(kind if narrow else (kind, value < 2**63))
            else:
                kinds.append(value.dtype)
                value = value.data_ptr()
                addresses |= value
            given.append(value)
    except AttributeError:
        raise TypeError(
            f"a launch changes by tensors, None and integers, not by {value!r}"
        ) from None
    if addresses % 16:
        kinds += [v is not None and v % 16 == 0 for v in given]
    return tuple(kinds), given


def _only_launches(kernel: Any) -> bool:
    """Whether a launch of a kernel that is compiled does nothing else, in a Triton known here."""
    if not KNOWN or type(kernel) is not JITFunction or JITFunction.run is not _run:
        return False
    knobs = triton.knobs.runtime
    enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # of a chain, where it is
        return False
    inspected = getattr(knobs, "add_stages_inspection_hook", None)
    modes = knobs.debug or triton.knobs.compilation.instrumentation_mode or inspected
    return not (modes or kernel.pre_run_hooks)


def _is_known(compiled: Any) -> bool:
    """Whether Triton gave a kernel for NVIDIA's GPUs, and no promise of one."""
    return isinstance(compiled, triton.compiler.CompiledKernel) and (
        compiled.metadata.target.backend == "cuda"
    )

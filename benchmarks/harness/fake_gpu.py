"""A GPU that is not there: Triton binds a launch as on a GPU, compiles nothing, and notes it."""

import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from fastdiff.ops import dispatch


class Launched(NamedTuple):
    """What the driver's launcher was handed."""

    grid: tuple[int, int, int]
    stream: int
    compiled: CompiledKernel  # in the place of its function
    packed: tuple  # warps, clusters, shared memory
    arguments: tuple  # of the kernel, addresses for tensors


class Compiled(CompiledKernel):
    """One specialisation of a kernel as ``kernel[grid](...)`` would compile it."""

    def __init__(self, gpu: "FakeGpu", kernel: JITFunction, options: Any) -> None:
        self.metadata = SimpleNamespace(target=gpu.get_current_target())
        self.packed_metadata = (options.num_warps, options.num_ctas, 0)
        self.name, self.src = kernel.__name__, None
        self.module, self.function, self._run = None, self, gpu.launch

    def _init_handles(self) -> None:
        pass


class FakeGpu:
    """Triton's driver. ``launches``: what was launched, or None where it is not to be noted."""

    numbers = itertools.count(1000)  # of devices that Triton's caches know nothing of

    def __init__(self, noting: bool) -> None:
        self.device, self.stream = next(self.numbers), 0
        self.launches: list[Launched] | None = [] if noting else None
        self.compiled = 0
        self.launch = self.note if noting else lambda *_: None

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def note(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments) -> None:
        def known(value: Any) -> Any:
            return value.data_ptr() if isinstance(value, torch.Tensor) else value

        self.launches.append(
            Launched((x, y, z), stream, function, packed, tuple(map(known, arguments)))
        )


@contextlib.contextmanager
def fake_gpu(noting: bool = True) -> Iterator[FakeGpu]:
    """Within: Triton's kernels serve CPU tensors where the backend "triton" is named, and compute
    nothing."""
    gpu = FakeGpu(noting)

    def compile_nothing(self, key, signature, device, constexprs, options, attrs, warmup):
        gpu.compiled += 1
        compiled = self.device_caches[device][0][key] = Compiled(gpu, self, options)
        return compiled

    driver = triton.runtime.driver
    before = driver._active, JITFunction._do_compile, dispatch.problem
    driver.set_active(gpu)
    JITFunction._do_compile, dispatch.problem = compile_nothing, lambda *_: ""
    try:
        yield gpu
    finally:
        driver._active, JITFunction._do_compile, dispatch.problem = before

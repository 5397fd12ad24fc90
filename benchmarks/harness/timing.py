"""How one contender's turn is timed: the wall clock on a CPU, a replayed CUDA graph on a GPU.

A turn answers seconds per call. Whatever is compared takes its turns alternately (conftest.race),
so that all meet the same machine in the same state.
"""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import fastdiff

Inputs = tuple[torch.Tensor, ...]

CALLS_PER_GRAPH = 100
GRAPH_S = 0.02  # a replay that takes this long needs no more calls
CPU_TURN_S = 50e-6  # shorter calls are timed several at a time
LONG_TURN_S = 0.3  # a longer first call says enough: no second one to warm up
POOL_ELEMENTS = 1 << 20


@dataclass
class Contender:
    """Something to time: ``call(*inputs)`` under a named backend (None: the plan's choice).

    optional: dropped, with a note, where it fails. capturable: False for what copies from the host,
    which no CUDA graph can hold (trying would leave the random generator broken).
    """

    name: str
    call: Callable[..., object]
    backend: str | None = None
    optional: bool = False
    capturable: bool = True


class CpuTurn:
    def __init__(self, contender: Contender, inputs: list[Inputs]):
        self.contender, self.inputs = contender, inputs[0]
        self.calls = 1
        self.how = "wall clock"
        self.estimate = self()  # compilation, first allocations
        if self.estimate < LONG_TURN_S or contender.name == "compiled":
            self.estimate = self()

    def __call__(self) -> float:
        call, inputs = self.contender.call, self.inputs
        fastdiff.set_backend(self.contender.backend)
        start = time.perf_counter()
        for _ in range(self.calls):
            call(*inputs)
        return (time.perf_counter() - start) / self.calls


class GpuTurn:
    """``calls`` calls over rotating inputs, replayed as one CUDA graph between two events.

    Where the capture fails, the same calls are launched one by one: ``how`` says which.
    """

    def __init__(self, contender: Contender, inputs: list[Inputs]):
        self.contender, self.inputs = contender, inputs
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)
        self.calls = len(inputs)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.how = "events"
        self()  # compilation, first allocations
        alone = self()
        if self.calls < CALLS_PER_GRAPH:
            rounds = math.ceil(min(CALLS_PER_GRAPH, GRAPH_S / max(alone, 1e-6)) / self.calls)
            self.calls *= max(rounds, 1)
        if contender.capturable:
            self._capture()
        self.estimate = self()

    def _capture(self) -> None:
        """Not by torch.cuda.graph, which empties the allocator's cache at every capture."""
        fastdiff.set_backend(self.contender.backend)
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        collecting = gc.isenabled()
        gc.disable()  # freeing an older graph would spoil the capture
        try:
            with torch.cuda.stream(side):
                self.contender.call(*self.inputs[0])
                torch.cuda.synchronize()
                graph.capture_begin()
                try:
                    self._launch()
                finally:
                    graph.capture_end()
            self.graph, self.how = graph, "graph"
        except RuntimeError as error:
            self.how = f"events: not capturable ({' '.join(str(error).split())[:60]})"
        finally:
            if collecting:
                gc.enable()
            torch.cuda.synchronize()

    def _launch(self) -> None:
        call, inputs = self.contender.call, self.inputs
        for i in range(self.calls):
            call(*inputs[i % len(inputs)])

    def __call__(self) -> float:
        fastdiff.set_backend(self.contender.backend)
        self.start.record()
        if self.graph is None:
            self._launch()
        else:
            self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3 / self.calls


def seconds(call: Callable[[], object]) -> float:
    """Of one call, by the wall clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def turn_type(device: torch.device) -> type[CpuTurn] | type[GpuTurn]:
    return GpuTurn if device.type == "cuda" else CpuTurn


def choose_calls(turns: list[CpuTurn] | list[GpuTurn], device: torch.device) -> None:
    """One number of calls per turn for all on the CPU, so that their timing costs the same."""
    if device.type == "cpu":
        calls = max(1, min(8, int(CPU_TURN_S / min(turn.estimate for turn in turns))))
        for turn in turns:
            turn.calls = calls


def input_sets(
    first: Inputs, more: Callable[[], Inputs] | None, device: torch.device
) -> list[Inputs]:
    """``first``, and on a GPU as many more as three times its L2 holds, at most a graph's calls."""
    if device.type != "cuda" or more is None:
        return [first]
    size = sum(tensor.numel() * tensor.element_size() for tensor in first) or 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = max(1, min(CALLS_PER_GRAPH, math.ceil(3 * cache / size)))
    return [first] + [more() for _ in range(count - 1)]


_pool: dict[torch.device, torch.Tensor] = {}


def normal(
    *shape: int, dtype: torch.dtype, device: torch.device, layout: str = "NCHW", offset: int = 0
) -> torch.Tensor:
    """Normal values of ``shape``: a repeated million, since drawing them all would take longer
    than the measurement. ``offset`` shifts them, so that two tensors differ."""
    if device not in _pool:
        generator = torch.Generator().manual_seed(0)
        _pool[device] = torch.randn(POOL_ELEMENTS, generator=generator).to(device)
    pool = _pool[device].roll(offset).to(dtype)
    size = math.prod(shape)
    flat = torch.empty(size, dtype=dtype, device=device)
    whole = size // POOL_ELEMENTS * POOL_ELEMENTS
    flat[:whole].view(-1, POOL_ELEMENTS)[:] = pool
    flat[whole:] = pool[: size - whole]
    if layout == "channels_last":
        n, channels, *rest = shape
        return flat.view(n, *rest, channels).movedim(-1, 1)
    return flat.view(shape)


def with_backward(call: Callable[..., torch.Tensor]) -> Callable[..., object]:
    """Forward and backward of ``call``: the last input is the gradient of its result, and the
    inputs that require one get theirs."""

    def step(*inputs: torch.Tensor) -> object:
        *arguments, upstream = inputs
        wanted = [tensor for tensor in arguments if tensor.requires_grad]
        return torch.autograd.grad(call(*arguments), wanted, upstream)

    return step


def large_copy_gbps(device: torch.device) -> float:
    """GB/s read and written by a copy between two buffers that no cache holds."""
    size = 1 << (30 if device.type == "cuda" else 28)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best_of(lambda: target.copy_(source), device) / 1e9


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square matrix product (float32 as torch is set: no tf32 by default)."""
    n = 1024 if device.type == "cpu" else 8192 if dtype != torch.float32 else 4096
    a, b = (normal(n, n, dtype=dtype, device=device, offset=i) for i in range(2))
    return 2 * n**3 / _best_of(lambda: a @ b, device) / 1e12


def _best_of(call: Callable[[], object], device: torch.device, rounds: int = 15) -> float:
    turn = turn_type(device)(Contender("", call), [()])
    return min(turn() for _ in range(rounds))

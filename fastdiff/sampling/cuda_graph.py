"""One call as a CUDA graph: captured on the device's side stream, replayed on any."""

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import cuda
from torch.backends import cudnn

MEASURED = 4  # calls at a time

# Of the process, because PyTorch takes one capture at a time and the modes set here are global. On
# its device other samplers' replays wait meanwhile: they share the stream's workspace.
_capturing = threading.RLock()


class Side:
    """The stream of a device's captures, one for all samplers of the process: for every stream
    that it meets cuBLAS keeps a workspace for good.

    All graphs may read and write that workspace, and those of a sampler share their memory: what
    they do comes one after the other, on whatever streams they are replayed. ``lock``: of
    ``last``, the stream of the last replay, and of what is run on ``stream``.
    """

    _all: dict[torch.device, "Side"] = {}

    def __init__(self, device: torch.device):
        self.device, self.stream = device, cuda.Stream(device)
        self.last = self.stream
        self.lock = threading.RLock()

    @classmethod
    def of(cls, device: torch.device) -> "Side":
        with _capturing:
            if device not in cls._all:
                cls._all[device] = cls(device)
            return cls._all[device]

    def join(self) -> None:
        """What the current stream does next comes after the last replay."""
        with self.lock:
            current = cuda.current_stream(self.device)
            if current != self.last:
                current.wait_stream(self.last)
                self.last = current

    @contextmanager
    def use(self) -> Iterator[None]:
        """Inside, the stream is the current one, and nobody else's."""
        with _capturing, self.lock:
            self.join()
            outside = self.last
            self.stream.wait_stream(outside)
            try:
                with cuda.stream(self.stream):
                    yield
            finally:  # also of a call that failed: its memory is given to others
                outside.wait_stream(self.stream)


class CudaGraph:
    """One call recorded as a CUDA graph; ``replay`` runs it again on the same memory.

    ``place``: a memory pool, which a sampler's graphs share, and the side of the device. ``warm``:
    the call is made twice before, which is not for one that has been made and changes something.
    """

    def __init__(
        self, call: Callable[[], Any], device: torch.device, place: Any, *, warm: bool = True
    ):
        self.graph = cuda.CUDAGraph()
        pool, self.side = place
        with self.side.use(), fastest_convolutions():
            if warm:
                call()  # libraries and Triton set themselves up, models keep what they compute once
                with waiting_refused():
                    call()
            try:
                self._capture(call, pool)
            except BaseException:
                _clean_up(self.graph, device, pool, self.side)
                raise

    def _capture(self, call: Callable[[], Any], pool: Any) -> None:
        # Out of a capture that failed cuda.graph does not always find back to its stream.
        with cuda.stream(self.side.stream), _graph(self.graph, pool, self.side):
            call()

    def join(self) -> None:
        """What the current stream does next comes after the last replay, on whatever stream."""
        self.side.join()

    def replay(self) -> None:
        with self.side.lock:
            self.side.join()
            self.graph.replay()

    @staticmethod
    def serves(device: torch.device) -> bool:
        return device.type == "cuda"

    @staticmethod
    def new_place(device: torch.device) -> Any:
        return cuda.graph_pool_handle(), Side.of(device)

    @staticmethod
    def on(device: torch.device) -> Any:
        return cuda.device(device)


def seconds_a_call(call: Callable[[], None], device: torch.device) -> float:
    """The time of one call among several that the device works off one after the other."""
    # Of the whole device nobody may wait while another thread captures.
    wait = cuda.current_stream(device).synchronize if device.type == "cuda" else nullcontext
    times = []
    for _ in range(3):
        wait()
        started = time.perf_counter()
        for _ in range(MEASURED):
            call()
        wait()
        times.append((time.perf_counter() - started) / MEASURED)
    return sorted(times)[1]


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Inside, reading a value back from the device and the like is a RuntimeError.

    In a capture it would be one too, but a capture that fails has to be cleaned up after. The mode
    is the process's: while there are other threads, which may wait, it stays as it is, and the
    capture finds out.
    """
    if threading.active_count() > 1:
        yield
        return
    before = cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode says of itself that it is a prototype
        cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        cuda.set_sync_debug_mode(before)


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """Inside, cuDNN measures which of its kernels is the fastest for a shape that it meets: a
    captured one is met at every replay. Not where the caller wants the same kernels every time."""
    asked = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    if asked or cudnn.benchmark or torch.backends.flags_frozen():
        yield
        return
    cudnn.benchmark = True
    try:
        yield
    finally:
        cudnn.benchmark = False


# PyTorch's allocator of pinned memory goes on asking these which streams they capture.
_failed: list[cuda.CUDAGraph] = []


def _clean_up(graph: cuda.CUDAGraph, device: torch.device, pool: Any, side: Side) -> None:
    """Leave PyTorch as it was before a capture that failed; the pool is not to be used again.

    ``CUDAGraph.capture_end`` stops where CUDA says that the capture was broken. The pool then goes
    on taking a capture's allocations, so that no other can begin, and in older PyTorch the device's
    generator stays in the capture, so that no random number can be drawn.
    """
    with suppress(RuntimeError):  # of a stream that still captures
        with cuda.stream(side.stream):
            graph.capture_end()
    graph.reset()
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
    except (AttributeError, RuntimeError):  # it takes none; or this PyTorch has another name for it
        return
    _failed.append(graph)
    with suppress(AttributeError, RuntimeError):  # else its memory is kept, and no more
        torch._C._cuda_releasePool(device.index, pool)
    # The end of a capture is the end of the generator's part in it, too, whichever began it.
    with suppress(RuntimeError), cuda.stream(side.stream):
        with _graph(cuda.CUDAGraph(), cuda.graph_pool_handle(), side):
            torch.zeros(1, device=device)


def _graph(graph: cuda.CUDAGraph, pool: Any, side: Side) -> Any:
    # "thread_local": other threads may go on using CUDA meanwhile.
    return cuda.graph(graph, pool=pool, stream=side.stream, capture_error_mode="thread_local")

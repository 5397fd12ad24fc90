"""What fastdiff/sampling/cuda_graph.py uses of torch.cuda, on the CPU: captures that fail as
PyTorch's do, and leave behind what PyTorch's leave behind."""

import itertools
from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.sampling import cuda_graph
from fastdiff.sampling.network import execution, packing
from graph_tape import Recording


class FakeCuda:
    """``recording``: pools that take a capture's allocations. ``uses``: captures that hold each
    pool. ``generator_captures``: torch.randn would fail. ``log``: what was done, in order."""

    def __init__(self):
        self.recording, self.uses, self.pools = set(), Counter(), itertools.count(1)
        self.capturing, self.generator_captures = None, False
        self.sync_mode, self.modes = 0, []
        self.streams = [Stream(self)]  # the first is the default stream
        self.entered = [self.streams[0]]
        self.graphs, self.log = [], []

    # --- torch.cuda -------------------------------------------------------------------------

    def CUDAGraph(self):  # noqa: N802
        return Graph(self)

    def Stream(self, device=None):  # noqa: N802
        self.streams.append(Stream(self))
        return self.streams[-1]

    def current_stream(self, device=None):
        return self.entered[-1]

    @contextmanager
    def stream(self, stream):
        before = len(self.entered)
        self.entered.append(stream)
        try:
            with _Watched(self) if before == 1 else nullcontext():
                yield
        finally:
            del self.entered[before:]

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.entered.append(stream)
        graph.capture_begin(pool)
        try:
            yield
        finally:
            graph.capture_end()
            assert self.entered.pop() is stream

    def graph_pool_handle(self):
        return 0, next(self.pools)

    def device(self, device):
        return nullcontext()

    def get_sync_debug_mode(self):
        return self.sync_mode

    def set_sync_debug_mode(self, mode):
        self.sync_mode = ["default", "warn", "error"].index(mode) if isinstance(mode, str) else mode
        self.modes.append(self.sync_mode)

    def is_current_stream_capturing(self):
        return self.capturing is not None and self.entered[-1] is self.capturing.stream

    def synchronize(self, device=None):
        pass

    def empty_cache(self):
        if self.recording:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def memory_stats(self):
        return {"allocation.all.allocated": 0}

    def memory_reserved(self):
        return self.uses.total()

    # --- torch._C ---------------------------------------------------------------------------

    def end_allocate_to_pool(self, device, pool):
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def release_pool(self, device, pool):
        assert self.uses[pool] > 0
        self.uses[pool] -= 1

    # --- What happens on the device ---------------------------------------------------------

    def wait(self):
        """A value is read back."""
        if self.sync_mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.capturing is not None:
            self.capturing.broken = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def draw(self, *shape):
        """torch.randn on the device."""
        if self.generator_captures and self.capturing is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        return torch.randn(*shape)


class Stream:
    def __init__(self, cuda):
        self.cuda = cuda

    def synchronize(self):
        pass

    def wait_stream(self, other):
        if self is not other:
            self.cuda.log.append(("wait", self, other))


class Graph:
    def __init__(self, cuda):
        self.cuda, self.pool, self.stream = cuda, None, None
        self.broken = self.ended = False
        self.recording = Recording()

    def capture_begin(self, pool):
        cuda = self.cuda
        cuda.empty_cache()
        assert cuda.entered[-1] is not cuda.streams[0]
        self.pool, self.stream = pool, cuda.entered[-1]
        cuda.recording.add(pool)
        cuda.uses[pool] += 1
        cuda.generator_captures = True
        cuda.capturing = self

    def capture_end(self):
        cuda = self.cuda
        if cuda.capturing is not self:
            raise RuntimeError("CUDA error: illegal state")
        cuda.capturing = None
        if self.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error")
        cuda.recording.remove(self.pool)
        cuda.generator_captures = False
        self.ended = True
        with torch.no_grad():
            self.recording.undo()
        cuda.graphs.append(self)

    def reset(self):
        if self.ended:
            self.cuda.uses[self.pool] -= 1
        self.ended = False

    def replay(self):
        assert self.ended
        self.cuda.log.append(("replay", self.cuda.entered[-1], self))
        with torch.no_grad():
            self.recording.replay()


class _Watched(TorchDispatchMode):
    """What is called on a stream: values that are read back, and what a capture records."""

    def __init__(self, cuda):
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.cuda.wait()
        if self.cuda.is_current_stream_capturing():
            return self.cuda.capturing.recording.call(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@contextmanager
def faked():
    """Inside, CudaGraph captures CPU tensors on a FakeCuda."""
    cuda = FakeCuda()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graph, "cuda", cuda)
        patch.setattr(cuda_graph.Side, "_all", {})
        patch.setattr(cuda_graph, "_failed", [])
        patch.setattr(cuda_graph.CudaGraph, "serves", staticmethod(lambda device: True))
        patch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.end_allocate_to_pool, raising=False)
        patch.setattr(torch._C, "_cuda_releasePool", cuda.release_pool, raising=False)
        patch.setattr(packing, "serves", lambda dtype: False)  # a GPU has nothing packed
        patch.setattr(execution, "slower", lambda dtype: "a GPU")  # nor programs
        yield cuda

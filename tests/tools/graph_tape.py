"""A stand-in for CUDA graphs on the CPU: the calls of one step, repeated on the same memory.

Like a graph it holds on to addresses and bakes in every Python number; a replay runs no Python of
the model, and a value read back to the host during the capture is an error.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

WARM_UPS = 2


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Tape:
    """What fastdiff.sampling.capture.CudaGraph does, by a list of operator calls."""

    made = 0

    def __init__(self, call, device, place):
        assert place == "a pool and a stream"
        for _ in range(WARM_UPS):
            call()
        with _Recorder() as recorder:
            call()
        self.calls = recorder.calls
        type(self).made += 1

    def join(self):
        pass  # there is one stream

    def replay(self):
        repeat(self.calls)

    @staticmethod
    def serves(device):
        return True

    @staticmethod
    def new_place(device):
        return "a pool and a stream"

    @staticmethod
    def on(device):
        return contextlib.nullcontext()


def repeat(calls):
    """What a replay does: the recorded calls on the memory that they were made on."""
    new = {}  # by the identity of the tensor that the capture made

    def current(value):
        return new.get(id(value), value) if isinstance(value, torch.Tensor) else value

    for func, args, kwargs, recorded in calls:
        result = func(*tree_map(current, args), **tree_map(current, kwargs))
        for before, now in zip(_tensors(recorded), _tensors(result), strict=True):
            if before is not now and not any(before is a for a in _tensors(args)):
                new[id(before)] = now


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return []

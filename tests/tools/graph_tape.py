"""A stand-in for CUDA graphs on the CPU: the calls of one step, repeated on the same memory.

Like a graph it holds on to addresses and bakes in every Python number; a replay runs no Python of
the model and leaves its results where the capture's were, what the capture writes over is as before
afterwards, and a value read back to the host during the capture is an error.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WARM_UPS = 2


class Recording:
    """The calls of a capture, which on a GPU does nothing yet."""

    def __init__(self):
        self.calls, self.before, self.made = [], {}, set()

    def call(self, func, args, kwargs):
        for storage in map(torch.Tensor.untyped_storage, _written(func, args, kwargs)):
            place = storage.data_ptr()
            if place not in self.made and place not in self.before:
                memory = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.before[place] = memory, memory.clone()
        result = func(*args, **kwargs)
        self.made |= _places(result) - _places([*args, *kwargs.values()])  # the calls keep it alive
        self.calls.append((func, args, kwargs, result))
        return result

    def undo(self):
        for memory, before in self.before.values():
            memory.copy_(before)

    def replay(self):
        for func, args, kwargs, recorded in self.calls:
            result = func(*args, **kwargs)
            for before, now in zip(_tensors(recorded), _tensors(result), strict=True):
                if before.data_ptr() != now.data_ptr():  # neither in place nor a view
                    before.copy_(now)


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.recording = Recording()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return self.recording.call(func, args, kwargs or {})


class Tape:
    """What fastdiff.sampling.capture.CudaGraph does, by a list of operator calls."""

    made = 0

    def __init__(self, call, device, place, *, warm=True):
        assert place == "a pool and a stream"
        for _ in range(WARM_UPS * warm):
            call()
        with _Recorder() as recorder:
            call()
        self.recording = recorder.recording
        with torch.no_grad():
            self.recording.undo()
        type(self).made += 1

    def join(self):
        pass  # there is one stream

    def replay(self):
        with torch.no_grad():
            self.recording.replay()

    @staticmethod
    def serves(device):
        return True

    @staticmethod
    def new_place(device):
        return "a pool and a stream"

    @staticmethod
    def on(device):
        return contextlib.nullcontext()


def _written(func, args, kwargs):
    """What a call writes into of what it is given."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from _tensors(value)


def _places(value):
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors(value)}


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return []

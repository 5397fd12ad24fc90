"""How many kernels a GPU would run, counted without one.

On tensors of the CPU: at Triton's launcher, which compiles and runs nothing, and at PyTorch's
dispatcher.
"""

import contextlib
from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.ops import backends
from harness.fake_gpu import fake_gpu

# What allocates, or looks at tensors, and what takes several kernels (aten/src/ATen/native/cuda).
NONE = {"empty", "empty_like", "empty_strided", "new_empty", "detach"}
SEVERAL = {"constant_pad_nd": 2}


class Kernels(TorchDispatchMode):
    """``counted``: the kernels of PyTorch's own operations, by name."""

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name.startswith("fastdiff::"):
            raise AssertionError(f"{name} went by the dispatcher: its launches are counted already")
        looks = any(a.alias_info and not a.alias_info.is_write for a in func._schema.returns)
        if not (looks or name in NONE):
            biased = name == "convolution" and args[2] is not None
            self.counted[name] += SEVERAL.get(name, 1) + biased
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting_kernels():
    """Within: Triton's kernels compute nothing, and all kernels are counted; yields a Counter of
    their names, filled at the end."""
    found = Counter()
    with fake_gpu() as gpu, backends.backend("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "nobody_listens", lambda: True)  # the counting mode is nobody
        with Kernels() as kernels:
            yield found
        found.update(kernels.counted)
        found.update(launch.compiled.name for launch in gpu.launches)

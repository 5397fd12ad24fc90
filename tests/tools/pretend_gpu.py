"""A pytest plugin: on_gpu.py's without a GPU, for faults that are the tests' own.

Tensors stay on the CPU, but one that the default device made is taken for one on a GPU, and what
PyTorch refuses there is refused: a generator of the CPU, NumPy, a mixture with what was made by
device="cpu". What went to a torch.device, an unknown one, may be either.
"""

import torch
from torch.overrides import TorchFunctionMode

FACTORIES = {"empty", "full", "ones", "zeros", "eye", "arange", "linspace", "tensor", "as_tensor"}
FACTORIES |= {"rand", "randn", "randint", "randperm", "normal", "logspace", "empty_strided"}
TO_NUMPY = ("numpy", "__array__")
MOVES = ("cpu", "to")
# Take tensors of several devices.
MIX = ("copy_", "__getitem__", "__setitem__", "__set__")


class PretendGpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        given = list(tensors((args, kwargs)))
        side = side_of_result(func.__name__, given, args, kwargs)
        result = func(*args, **kwargs)
        if func.__name__ in MOVES and getattr(result, "_side", side) != side:
            result = result.clone()  # moved nowhere
        for tensor in tensors(result):
            if not any(tensor is v for v in given):
                tensor._side = side
        return result


def side_of_result(name, given, args, kwargs):
    """'gpu', 'cpu' or None; raises what a GPU's tensors would."""
    devices = [v for v in (kwargs.get("device"), *args) if isinstance(v, (str, torch.device))]
    if name == "cpu" or "cpu" in devices:
        return "cpu"
    if devices:
        return None
    if name in FACTORIES:
        if getattr(kwargs.get("generator"), "device", None) == torch.device("cpu"):
            raise RuntimeError("expected a 'cuda' device type for generator but found 'cpu'")
        return "gpu"
    sides = {side for v in given if (side := getattr(v, "_side", None)) and v.dim()}
    if name in TO_NUMPY and "gpu" in sides:
        raise TypeError("can't convert a tensor on a GPU to NumPy: use .cpu() first")
    if len(sides) == 2 and name not in MIX:
        raise RuntimeError(f"{name}: tensors on a GPU and on the CPU")
    return "gpu" if "gpu" in sides else next(iter(sides), None)


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from tensors(entry)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def pytest_configure(config):
    PretendGpu().__enter__()

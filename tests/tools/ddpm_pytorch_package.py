"""denoising-diffusion-pytorch itself. What it imports for training alone and is not installed here
(torchvision's wheels want CUDA's libraries) is stood in for; sampling uses none of it."""

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest

MODULE = "denoising_diffusion_pytorch.denoising_diffusion_pytorch"
FOR_TRAINING = {
    "torchvision": ("transforms", "utils"),
    "accelerate": ("Accelerator",),
    "ema_pytorch": ("EMA",),
}


def package():
    """The module, or a skip where it is not installed."""
    if MODULE in sys.modules:
        return sys.modules[MODULE]
    if importlib.util.find_spec("denoising_diffusion_pytorch") is None:
        pytest.skip("denoising-diffusion-pytorch is not installed")
    stood_in = []
    for name, attributes in FOR_TRAINING.items():
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError):
            sys.modules[name] = ModuleType(name)
            for attribute in attributes:
                setattr(sys.modules[name], attribute, None)
            stood_in.append(name)
    # Without what its package imports beside the one module that is wanted.
    try:
        return _module(MODULE)
    finally:
        for name in stood_in:
            del sys.modules[name]


def _module(name):
    parent = name.partition(".")[0]
    if parent not in sys.modules:
        spec = importlib.util.find_spec(parent)
        sys.modules[parent] = ModuleType(parent)
        sys.modules[parent].__path__ = list(spec.submodule_search_locations)
    return importlib.import_module(name)

"""The codebases whose U-Nets run as fastdiff's programs, one file or folder each; no list names
them.

Each has ``READING``, a class derived from ``execution.foreign.Foreign``. Nothing of a codebase is
imported: a network that is to be read has brought it.
"""

from importlib import import_module
from pkgutil import iter_modules

from torch import nn

from fastdiff.models.execution.foreign import Foreign
from fastdiff.models.execution.reading import Reading
from fastdiff.models.unet import UNet

READINGS: list[type[Foreign]] = [
    import_module(f"{__name__}.{found.name}").READING for found in iter_modules(__path__)
]
_of_class = {name: reading for reading in READINGS for name in reading.classes}


def reading_of(module: nn.Module) -> Reading | None:
    """How a network is read: a UNet of fastdiff, diffusers' ``UNet2DModel``, the ``UNetModel`` and
    ``SuperResModel`` of improved-diffusion and guided-diffusion, and what derives from them. None
    for any other module.

    ``difference()`` of it says why the network as it stands is no program, and ``disagreement()``,
    asked after that, what its program answered else; "" where nothing. It is what an ``Executor``
    is made of.
    """
    if isinstance(module, UNet):
        return Reading(module)
    for kind in type(module).__mro__:
        reading = _of_class.get((kind.__module__, kind.__qualname__))
        if reading is not None:
            return reading(module)
    return None

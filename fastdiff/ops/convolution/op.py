"""A convolution with the norm before it and the additions after it in one call."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.ops.convolution import reference


class Packed(NamedTuple):
    """A convolution's weight (K, C, *kernel), and what a backend has made of it: ``panels``, None
    for the reference."""

    weight: Tensor
    panels: Tensor | None


def pack(weight: Tensor, dtype: torch.dtype) -> Packed:
    """The weight for convolutions of inputs stored in ``dtype``."""
    return Packed(weight.to(dtype), None)


convolution = reference.convolution
norm_coefficients = reference.norm_coefficients

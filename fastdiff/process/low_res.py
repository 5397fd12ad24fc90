"""The small image that a super-resolution network is given: made of the large one, and augmented.

A network trained on clean small images is confused by those that another network has drawn. In a
cascade it is therefore trained on spoilt ones, and told how much (Ho et al. 2022, "Cascaded
Diffusion Models", arXiv:2106.15282, section 4): z is noised to a level s in [0, 1],

    z_s = cos(πs/2)·z + sin(πs/2)·ε        ε ~ N(0, I)

and the network's ``noise_level`` is s. The noise is as strong as that of the process whose signal
is the same, so that a smaller network's samples may be taken before they are finished
(``level_of``). Blurring is its sibling for large images: the network is not told of it.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.methods.levels import Float64Array
from fastdiff.ops.counters import Counters
from fastdiff.process.forward import noised

BLUR_SIGMAS = (0.4, 0.6)  # pixels, the published range, of a kernel of 3 by 3


def low_res_size(image_size: Sequence[int], side: int) -> tuple[int, int]:
    """(h, w) of the small image of a large one, (H, W), whose shorter side becomes ``side``.

    Raises InputError unless it is smaller, and both sides are whole numbers.
    """
    height, width = image_size
    shorter = min(height, width)
    if not 1 <= side < shorter:
        raise InputError(
            f"images of {height}x{width} cannot be upsampled from {side} pixels; expected the "
            f"shorter side of smaller ones, 1 to {shorter - 1}"
        )
    if height * side % shorter or width * side % shorter:
        raise InputError(
            f"images of {height}x{width} are no whole number of pixels wide when the shorter side "
            f"is {side}: give another side, or crop them"
        )
    return height * side // shorter, width * side // shorter


def downsampled(images: Tensor, size: Sequence[int]) -> Tensor:
    """Float images (N, C, H, W) as (N, C, *size): each pixel the mean of those that it covers, as
    guided-diffusion trains its upsamplers."""
    return F.interpolate(images, tuple(size), mode="area")


def blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Float images (N, C, h, w) under a Gaussian kernel of 3 by 3, reflected at the edges.

    sigma: (N,), the kernel's standard deviation in pixels; 0 leaves an image as it is.
    """
    beside = torch.exp(-0.5 / sigma.double() ** 2)
    beside, middle = (v.to(images.dtype).view(-1, 1, 1, 1) for v in _normalised(beside))
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    rows = middle * padded[:, :, 1:-1] + beside * (padded[:, :, :-2] + padded[:, :, 2:])
    return middle * rows[..., 1:-1] + beside * (rows[..., :-2] + rows[..., 2:])


def _normalised(beside: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of the neighbours and of the middle, whose sum is one."""
    total = 1 + 2 * beside
    return beside / total, 1 / total


def noised_to(images: Tensor, levels: Tensor, **counters: Any) -> Tensor:
    """z_s of float images (N, C, h, w), like them.

    levels: (N,), s in [0, 1], of each image; at 0 it stays as it is. counters: seed, step and
    first_sample, of which the noise is drawn as that of ``fastdiff.ops.q_sample``.
    """
    # A row more than there are samples: a table may not be empty, and its last row is no sample's.
    angles = F.pad(levels.double(), (0, 2)) * (math.pi / 2)
    tables = (angles.cos().to(images.dtype), angles.sin().to(images.dtype))
    rows = torch.arange(len(levels), device=levels.device)
    return noised(images, rows, tables, None, None, Counters(**counters))[0]


def level_of(signal: Float64Array, noise: Float64Array) -> Float64Array:
    """s of a process's x_t = signal·x_0 + noise·ε, once that is divided by hypot(signal, noise)."""
    return np.arctan2(noise, signal) * (2 / math.pi)

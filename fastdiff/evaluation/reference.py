"""What samples are compared with, as moments in a file: guided-diffusion's reference batches."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.files import replacing
from fastdiff.images import read_npz

# Kind of features -> (mean, covariance), as such files name them.
NAMES = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True)
class Moments:
    """Of features: mean (D,), unbiased covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor


def moments_of(chunks: Iterable[Tensor]) -> Moments:
    """Of features in chunks (n, D): in one pass, in float64, about the first chunk's mean."""
    count, shift, total, products = 0, None, None, None
    for chunk in chunks:
        values = chunk.double()
        shift = values.mean(0) if shift is None else shift
        values = values - shift
        total = values.sum(0) if total is None else total + values.sum(0)
        products = values.T @ values if products is None else products + values.T @ values
        count += len(values)
    if count < 2 or shift is None or total is None or products is None:
        raise InputError(f"{count} images have no covariance: expected at least 2")
    mean = total / count
    covariance = (products - count * torch.outer(mean, mean)) / (count - 1)
    return Moments(shift + mean, covariance)


def read_reference(path: str | Path, features: str | None = None) -> dict[str, Moments] | None:
    """The moments in an ``.npz``, by kind of features; None for a file that has none, of images
    alone. InputError for moments of no use, and of another network than ``features`` where the file
    names its own (guided-diffusion's do not)."""
    _, arrays = read_npz(path, ("features", *itertools.chain(*NAMES.values())))
    whose = str(arrays.get("features", features))
    if features is not None and whose != features:
        raise InputError(f"'{path}' holds moments of {whose}'s features, not of {features}'s")
    found = {
        kind: _checked(path, *(arrays[name] for name in names))
        for kind, names in NAMES.items()
        if all(name in arrays for name in names)
    }
    return found or None


def write_reference(path: str | Path, moments: Mapping[str, Moments], features: str) -> None:
    """Write such a file; ``features`` names the network, which guided-diffusion's leave open."""
    arrays: dict[str, Any] = {"features": np.array(features)}
    for kind, found in moments.items():
        mean, covariance = NAMES[kind]
        arrays[mean], arrays[covariance] = found.mean.numpy(), found.covariance.numpy()
    with replacing(Path(path)) as stream:
        np.savez(stream, **arrays)


def _checked(path: str | Path, mean: np.ndarray, covariance: np.ndarray) -> Moments:
    for array in (mean, covariance):
        if array.dtype.kind != "f":
            raise InputError(f"'{path}': moments of {array.dtype}, expected floats")
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise InputError(
            f"'{path}': a mean of {mean.shape} and a covariance of {covariance.shape}; expected "
            "(D,) and (D, D)"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"'{path}': its moments are not finite")
    return Moments(
        torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64))
    )

"""Precision, recall, density and coverage: whose neighbourhoods hold whom."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastdiff.errors import InputError

ROWS = 1024  # whose distances to COLUMNS others are held at a time, in float64
COLUMNS = 8192


def precision_recall(
    real: Tensor, fake: Tensor, k: int = 3, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Of features ``real`` (n, D) and ``fake`` (m, D), with n, m > k.

    An image's neighbourhood reaches to its k-th nearest of its own kind. ``precision``: the share
    of fakes in some real one's; ``recall``: of real ones in some fake's (Kynkäänniemi et al. 2019,
    eq. 2). ``density``: in how many of k real neighbourhoods a fake lies on average; ``coverage``:
    the share of real ones whose neighbourhood holds a fake (Naeem et al. 2020, eq. 3, 4).
    Distances in float64; memory does not grow with n·m. Raises InputError for too few.
    """
    for name, features in (("real images", real), ("samples", fake)):
        if len(features) <= k:
            raise InputError(f"{len(features)} {name}; precision and recall need more than k={k}")
    radii_real, radii_fake = (_radii(features, k, device) for features in (real, fake))
    inside_real = torch.zeros(len(fake), dtype=torch.int64)  # how many real ones hold each fake
    recalled = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    for rows, columns, squared in _distances(real, fake, device):
        held = squared < radii_real[rows, None].to(device)
        inside_real[columns] += held.sum(0).cpu()
        covered[rows] |= held.any(1).cpu()
        recalled[rows] |= (squared < radii_fake[None, columns].to(device)).any(1).cpu()
    return {
        "precision": float((inside_real > 0).double().mean()),
        "recall": float(recalled.double().mean()),
        "density": float(inside_real.double().mean() / k),
        "coverage": float(covered.double().mean()),
    }


def nearest(
    queries: Tensor,
    references: Tensor,
    device: torch.device | str = "cpu",
    *,
    itself: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Of each query (n, D) the distance to its nearest reference, float64 (n,), and which that is,
    int64 (n,). ``itself``: int64 (n,), the reference that is the query's own image, left out."""
    best = torch.full((len(queries),), torch.inf, dtype=torch.float64)
    which = torch.zeros(len(queries), dtype=torch.int64)
    for rows, columns, squared in _distances(queries, references, device):
        if itself is not None:
            at = itself[rows] - columns.start
            here = ((at >= 0) & (at < squared.shape[1])).nonzero()[:, 0]
            squared[here.to(squared.device), at[here].to(squared.device)] = torch.inf
        values, found = (t.cpu() for t in squared.min(1))
        closer = values < best[rows]
        best[rows] = torch.where(closer, values, best[rows])
        which[rows] = torch.where(closer, found + columns.start, which[rows])
    return best.sqrt(), which


def _radii(features: Tensor, k: int, device: torch.device | str) -> Tensor:
    """The squared distance of each to its k-th nearest, itself left out: float64 (n,)."""
    nearest = torch.full((len(features), k + 1), torch.inf, dtype=torch.float64)
    for rows, _, squared in _distances(features, features, device):
        both = torch.cat([nearest[rows].to(device), squared], 1)
        nearest[rows] = both.topk(k + 1, largest=False).values.cpu()
    return nearest[:, k]


def _distances(
    a: Tensor, b: Tensor, device: torch.device | str
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared Euclidean distances of all of ``a`` to all of ``b``, block by block."""
    for start in range(0, len(a), ROWS):
        rows = slice(start, min(start + ROWS, len(a)))
        x = a[rows].to(device).double()
        for first in range(0, len(b), COLUMNS):
            columns = slice(first, min(first + COLUMNS, len(b)))
            y = b[columns].to(device).double()
            squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
            squared.clamp_(min=0)
            if a is b:  # an image is nearest to itself, before its copies
                squared.diagonal(start - first).fill_(-1)
            yield rows, columns, squared

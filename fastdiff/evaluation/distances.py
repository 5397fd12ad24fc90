"""Distances between sets of images: Fréchet, and to the nearest image."""

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.evaluation.threads import one_thread

CHUNK_BYTES = 1 << 27  # of float64 images held at a time


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to features ``a`` (n, D) and ``b`` (m, D).

    Heusel et al. 2017, eq. 6 (Dowson & Landau 1982). It falls as n and m grow even when both sets
    come from one source, so only distances of equal counts can be compared. Raises
    InputError for shapes that do not fit, and below two of either.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise InputError(
            f"features are {a.shape} and {b.shape}, expected (n, D) and (m, D) with n, m >= 2"
        )
    return frechet_from_moments(*_moments(a), *_moments(b))


def frechet_from_moments(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """|mean_a - mean_b|² + tr(cov_a + cov_b - 2 (cov_a cov_b)^½), in float64.

    tr (A B)^½ is the sum of the singular values of A^½ B^½: no root of a matrix that is not
    symmetric, and no square root of a rounding error where a covariance lacks full rank.
    """
    difference = mean_a - mean_b
    with one_thread():
        cross = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum().item()
    distance = difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return max(float(distance), 0.0)


def nearest_distances(
    queries: Tensor, references: Tensor, *, leave_out: Tensor | None = None
) -> np.ndarray:
    """Euclidean distance of each query to its nearest reference, float64 (n,).

    Args:
        queries: uint8 (n, C, H, W); distances are in units of [-1, 1].
        references: uint8 (m, C, H, W).
        leave_out: int64 (n,), a reference that query i must not match (itself, for leave-one-out).

    Exact: |q|² + |r|² - 2 q·r runs over integers below 2^53, so a copy is at distance 0. Raises
    InputError for images of different sizes.
    """
    queries, references = queries.flatten(1), references.flatten(1)
    if queries.shape[1] != references.shape[1]:
        raise InputError(
            f"images of {queries.shape[1]} and {references.shape[1]} values cannot be compared"
        )
    chunk = max(1, CHUNK_BYTES // (8 * max(queries.shape[1], 1024)))
    best = torch.full((len(queries),), torch.inf, dtype=torch.float64, device=queries.device)
    for start in range(0, len(references), chunk):
        r = references[start : start + chunk].double()
        r_norm = r.square().sum(1)
        for first in range(0, len(queries), 1024):
            q = queries[first : first + 1024].double()
            squared = q.square().sum(1)[:, None] + r_norm - 2 * q @ r.T
            if leave_out is not None:
                column = leave_out[first : first + 1024] - start
                here = ((column >= 0) & (column < len(r))).nonzero().squeeze(1)
                squared[here, column[here]] = torch.inf
            part = best[first : first + 1024]
            torch.minimum(part, squared.amin(1), out=part)
    return (best.sqrt() / 127.5).cpu().numpy()


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D) of features (n, D)."""
    rows = torch.from_numpy(features.astype(np.float64))
    with one_thread():
        covariance = torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1])
        return rows.mean(0).numpy(), covariance.numpy()


def _root(covariance: np.ndarray) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(covariance.astype(np.float64)))
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

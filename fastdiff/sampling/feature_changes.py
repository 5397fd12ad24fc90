"""How much a network's deep features change from row to row, measured on samples."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.sampling.call import Call, Inputs
from fastdiff.sampling.reuse import WHOLE, best_rows, rows_within
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.stats import Stats
from fastdiff.sampling.step import State


def measured_rows(
    sampler: Sampler, whole: int, shape: Sequence[int], *, depth: int = 2, **inputs: Any
) -> list[int]:
    """The ``whole`` rows of a sampler's table that are best run whole, for ``reuse``: those that
    leave the least relative change between the features that rows reuse and their own.

    ``shape``, ``inputs``: as of ``Sampler.iterate``, of the few samples that are drawn to measure,
    without reuse; ``depth``: at which the network is cut. Holds the features of all rows.

    InputError where the sampler's network cannot be cut, and for as many rows as there are not;
    TrainingError where the samples are not finite.
    """
    changes = feature_changes(sampler, shape, depth=depth, **inputs)
    return best_rows(changes, whole)


def adaptive_rows(
    sampler: Sampler, threshold: float, shape: Sequence[int], *, depth: int = 2, **inputs: Any
) -> list[int]:
    """The rows of a sampler's table to run whole, for ``reuse``, as the features decide: each row
    whose own differ from those that were kept last by more than ``threshold`` (a share, 0.1 being
    a tenth of their sum). Arguments and errors as of ``measured_rows``.

    Decided on the few samples that are measured, once, and not as samples are drawn: there the
    other samples of a batch would have a say in it, and a sample would no longer be the same in any
    batch.
    """
    return rows_within(feature_changes(sampler, shape, depth=depth, **inputs), threshold)


@torch.no_grad()
def feature_changes(
    sampler: Sampler, shape: Sequence[int], *, depth: int = 2, **inputs: Any
) -> NDArray[np.float64]:
    """(K, K): Σ|f_j − f_i| / Σ|f_j| of the deep features f of rows i and j, in the mean over
    samples drawn as ``Sampler.sample`` does without reuse. For guidance: the conditional half's."""
    given = Inputs(shape, **inputs)
    device = sampler.device or sampler.network.device or torch.device("cpu")
    call = Call(sampler, given, device, Stats())
    state, features = State.beginning(call.x, call.table), []
    with ExitStack() as stack:
        stack.enter_context(sampler.network.sampling(False, call.timesteps, depth))
        if sampler.guide is not None:
            stack.enter_context(sampler.guide.sampling(False, call.timesteps))
        for i in range(len(call.timesteps)):
            run = replace(call.run_of(i), depth=depth)
            made = state.anew()
            x, x_start = run.advance(made, i, WHOLE)
            run.check_finite(x, i)
            features.append(made.features[0][: len(x)].flatten(1))
            state = replace(state, x=x, x_start=x_start)
    rows = [[_change(kept, own) for own in features] for kept in features]
    return np.array(rows)


def _change(kept: Tensor, own: Tensor) -> float:
    apart = (own.float() - kept.float()).abs().sum(1) / own.float().abs().sum(1)
    return float(apart.mean())

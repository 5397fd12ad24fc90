"""What k-diffusion's samplers share: x from row to row, and a bar that shows how far it is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.methods.levels import Level
from fastdiff.methods.rows import Row
from fastdiff.methods.table import StepTable
from fastdiff.ops.posterior_step.op import posterior_step
from fastdiff.optional import require

Model = Callable[..., Tensor]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[dict[str, Any]], Any]


class Walk:
    """Rows that x (N, C, ...) takes: the model's answer at a row's σ, and a fused step.

    ``table``: the rows, on the device of x; its timesteps are σ.
    """

    def __init__(
        self, model: Model, x: Tensor, rows: Sequence[Row], extra_args: dict[str, Any] | None
    ) -> None:
        self.model, self.extra_args = model, extra_args or {}
        self.table = StepTable.from_rows([row.columns() for row in rows]).to(x.device)
        self.memory = tuple(torch.zeros_like(x) for _ in range(self.table.slots))
        self.ones = x.new_ones(len(x))

    def denoised(self, x: Tensor, row: int) -> Tensor:
        """x_0 as the model sees it."""
        return self.model(x, self.table.timesteps[row] * self.ones, **self.extra_args)

    def step(self, x: Tensor, denoised: Tensor, row: int, noise: Tensor | None = None) -> Tensor:
        """x after the row. ``noise``: N(0, I), for rows that draw some."""
        after, _ = posterior_step(
            x, denoised, self.table, row, noise=noise, memory=self.memory, return_x_start=False
        )
        return after


def level(sigma: float) -> Level:
    """Where the model is given σ and answers x_0."""
    return Level(1.0, sigma, a=0.0, b=1.0, timestep=sigma)


def check_x(x: Tensor) -> None:
    """InputError for no x."""
    if not isinstance(x, Tensor) or x.dim() < 2:
        raise InputError(f"x is a {type(x).__name__}; expected a tensor (N, C, ...)")


@contextmanager
def progress(total: int | None, disable: bool | None) -> Iterator[Callable[[], object]]:
    """k-diffusion's progress bar, and what advances it by one; none where it is disabled."""
    if disable:
        yield lambda: None
    else:
        with require("tqdm.auto", "train").tqdm(total=total, disable=disable) as bar:
            yield bar.update

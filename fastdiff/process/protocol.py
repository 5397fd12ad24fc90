"""What the equations beside this file read of the GaussianDiffusion that they belong to."""

from typing import Any, Protocol

from torch import Tensor

from fastdiff.methods.levels import Float64Array
from fastdiff.methods.protocol import Process
from fastdiff.methods.table import StepTable
from fastdiff.process.tables import Tables


class Gaussian(Process, Protocol):
    """A GaussianDiffusion, to those who stand below it."""

    num_timesteps: int
    alphas_cumprod_next: Float64Array
    learns_variance: bool
    loss_type: str
    loss_weighting: str | None
    last_variance: float
    _tables: Tables
    _step_tables: dict[tuple, tuple[StepTable, Tensor]]

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor: ...

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    def p_mean_variance(
        self, model: Any, x: Tensor, t: Tensor, clip_denoised: bool = True, *, model_kwargs: Any
    ) -> dict[str, Tensor]: ...

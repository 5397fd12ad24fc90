"""What is asked of a process beside what samples it: by a trainer, and by the equations here."""

from typing import Any, Protocol

from torch import Tensor

from fastdiff.methods.levels import Float64Array
from fastdiff.methods.protocol import Process
from fastdiff.methods.table import StepTable
from fastdiff.process.tables import Tables


class Trainable(Process, Protocol):
    """A process as a trainer sees it: GaussianDiffusion, VarianceExploding and EDM are such.

    ``continuous`` says what t (N,) of ``training_losses`` is: integers in 0 … num_timesteps − 1, or
    if True float32 quantiles in [0, 1] of the distribution that noise levels are trained at, to be
    drawn uniformly.
    """

    num_timesteps: int
    continuous: bool

    def training_losses(
        self,
        model: Any,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
        *,
        seed: int | Tensor | None = None,
        step: int | Tensor = 0,
        first_sample: int | Tensor = 0,
    ) -> dict[str, Tensor]: ...

    def to_config(self) -> dict[str, Any]: ...


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

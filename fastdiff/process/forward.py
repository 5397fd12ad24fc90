"""The forward process q and its posterior: float64 tables, and what is gathered from them.

Everything a diffusion process knows without a network. Equation numbers: Ho et al. 2020.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdiff.checks import check_float, check_like
from fastdiff.errors import InputError
from fastdiff.ops.normal.op import draw_like
from fastdiff.ops.q_sample.op import q_sample
from fastdiff.process.schedules import check_betas
from fastdiff.process.tables import FloatArray, ProcessTables, TablesAt, check_timestep_map


class ForwardProcess(ProcessTables):
    """q(x_t | x_0) and q(x_{t-1} | x_t, x_0) for a sequence of betas (GaussianDiffusion's base)."""

    def __init__(
        self,
        betas: npt.ArrayLike,
        *,
        rescale_timesteps: bool = False,
        timestep_map: Sequence[int] | npt.NDArray[np.int64] | None = None,
        original_num_steps: int | None = None,
    ):
        super().__init__()
        self.betas = check_betas(betas)
        if 1.0 - self.betas[0] == 1.0:
            raise InputError(
                f"the first beta, {self.betas[0]}, is too small to add noise in float64"
            )
        self.num_timesteps = len(self.betas)
        self.timestep_map, self.original_num_steps = check_timestep_map(
            timestep_map, original_num_steps, self.num_timesteps
        )
        self.rescale_timesteps = bool(rescale_timesteps)
        # float32 · float32, as the published wrapper multiplies: networks get the same numbers.
        scale = np.float32(1000.0 / self.original_num_steps if rescale_timesteps else 1.0)
        self.model_timesteps = self.timestep_map.astype(np.float32) * scale

        alphas = 1.0 - self.betas
        self.alphas_cumprod = np.cumprod(alphas, dtype=np.float64)
        if not (self.alphas_cumprod[:-1] > 0).all():
            step = int(np.argmin(self.alphas_cumprod > 0))
            raise InputError(
                f"no signal is left at step {step} of {self.num_timesteps} (alphas_cumprod is 0): "
                "only the last step may reach zero, use fewer steps or smaller betas"
            )
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        one_minus = 1.0 - self.alphas_cumprod
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(one_minus)
        self.log_one_minus_alphas_cumprod = np.log(one_minus)
        with np.errstate(divide="ignore"):  # infinite where a schedule ends at zero SNR
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1.0)

        # The posterior q(x_{t-1} | x_t, x_0), eq. 6-7.
        prev = self.alphas_cumprod_prev
        self.posterior_variance = self.betas * (1.0 - prev) / one_minus
        self.posterior_mean_coef1 = self.betas * np.sqrt(prev) / one_minus
        self.posterior_mean_coef2 = (1.0 - prev) * np.sqrt(alphas) / one_minus
        # The first posterior variance is 0: step 1 lends its own, for the sake of the logarithm
        # (the published choice). A process of a single step has no step 1: its beta stands in.
        first = self.posterior_variance[1] if self.num_timesteps > 1 else self.betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.fixed_large_variance = np.append(first, self.betas[1:])

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0), eq. 4; each (N, ...) like x_start.

        ``x_start`` (N, ...) float, ``t`` (N,) integer in 0 … K-1 (0 is one step of noise). Float32,
        or float64 for float64 input. Raises InputError for arguments that do not fit; on devices
        other than the CPU a t out of range gives NaN instead.
        """
        at = self._at(t, x_start, "x_start")
        mean = at["sqrt_alphas_cumprod"] * x_start.to(at.dtype)
        variance = at["one_minus_alphas_cumprod"].expand(x_start.shape)
        return mean, variance, at["log_one_minus_alphas_cumprod"].expand(x_start.shape)

    def q_sample(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw x_t ~ q(x_t | x_0), eq. 4: like x_start. Arguments as :meth:`q_mean_variance`.

        ``noise`` is N(0, 1) of x_start's shape, drawn (from ``generator``, if given) when None.
        """
        check_float(x_start, "x_start")
        tables = self._tables(x_start)
        return q_sample(
            x_start,
            t,
            tables["sqrt_alphas_cumprod"][:-1],
            tables["sqrt_one_minus_alphas_cumprod"][:-1],
            noise=draw_like(x_start, generator) if noise is None else noise,
        )[0]

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), eq. 6-7.

        ``x_start`` and ``x_t`` (N, ...), ``t`` (N,). The variance at t = 0 is 0; its logarithm is
        taken at step 1. Results and errors as :meth:`q_mean_variance`.
        """
        check_like(x_start, "x_start", x_t, "x_t")
        at = self._at(t, x_t, "x_t")
        return (
            posterior_mean(at, x_start.to(at.dtype), x_t.to(at.dtype)),
            at["posterior_variance"].expand(x_t.shape),
            at["posterior_log_variance_clipped"].expand(x_t.shape),
        )

    def _named_tables(self) -> dict[str, FloatArray]:
        return {
            "alphas_cumprod": self.alphas_cumprod,
            "sqrt_alphas_cumprod": self.sqrt_alphas_cumprod,
            "one_minus_alphas_cumprod": 1.0 - self.alphas_cumprod,
            "sqrt_one_minus_alphas_cumprod": self.sqrt_one_minus_alphas_cumprod,
            "log_one_minus_alphas_cumprod": self.log_one_minus_alphas_cumprod,
            "posterior_variance": self.posterior_variance,
            "posterior_log_variance_clipped": self.posterior_log_variance_clipped,
            "posterior_mean_coef1": self.posterior_mean_coef1,
            "posterior_mean_coef2": self.posterior_mean_coef2,
        }


def posterior_mean(at: TablesAt, x_start: Tensor, x_t: Tensor) -> Tensor:
    """The mean of q(x_{t-1} | x_t, x_0), eq. 7."""
    return at["posterior_mean_coef1"] * x_start + at["posterior_mean_coef2"] * x_t


def mean_flat(x: Tensor) -> Tensor:
    """The mean of each sample: (N, ...) to (N,)."""
    return x.mean(dim=tuple(range(1, x.dim()))) if x.dim() > 1 else x

"""The variance-exploding process: x_t = x_0 + sigma_t·ε, beside the variance-preserving one.

Song et al. 2021 (arXiv:2011.13456) section 3.4 and appendix C; in its notation the SMLD of Song &
Ermon 2019. Sampling it needs nothing of its own: Sampler reads the process through a StepTable.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdiff.checks import check_float, check_positive, is_finite
from fastdiff.errors import InputError
from fastdiff.methods.levels import Float64Array
from fastdiff.ops.counters import Counters
from fastdiff.ops.normal import draw_like
from fastdiff.ops.q_sample.op import q_sample
from fastdiff.process.between import Grid, check_original, is_whole
from fastdiff.process.config import built
from fastdiff.process.forward import mean_flat, noised
from fastdiff.process.respacing import Respaced
from fastdiff.process.reverse import Model, check_choice, network_output
from fastdiff.process.score import Scored
from fastdiff.process.tables import Tables, TablesAt, TimestepMap, check_timestep_map

PROCESS = "variance_exploding"
MEAN_TYPES = ("epsilon", "x_start", "v")
VAR_TYPES = ("fixed_small", "fixed_large")
CONDITIONINGS = ("timestep", "log_sigma")
LOSS_WEIGHTINGS = ("inverse_variance", "edm", "min_snr")


def geometric_sigmas(
    num_steps: int, sigma_min: float = 0.01, sigma_max: float = 50.0
) -> Float64Array:
    """``num_steps`` noise levels in geometric progression, smallest first; float64 (num_steps,).

    Song et al. 2021, eq. 6; sigma_max should be near the largest distance between two data points
    (Song & Ermon 2020, technique 1). Raises InputError unless 0 < sigma_min < sigma_max and
    num_steps ≥ 2.
    """
    check_sigma_range(num_steps, sigma_min, sigma_max)
    return np.geomspace(sigma_min, sigma_max, num_steps, dtype=np.float64)


class VarianceExploding(Scored, Respaced):
    """q(x_t | x_0) = N(x_0, sigma_t²·I), its training losses, and what a StepTable reads of it.

    Args:
        sigmas: (T,) rising noise levels; see :func:`geometric_sigmas`.
        mean_type: what the network predicts: "epsilon", "x_start", or "v" =
            (ε − sigma·x_0)/√(1 + sigma²), which is EDM's target with unit data variance, sign apart
            (Karras et al. 2022, table 1).
        var_type: the reverse step's variance: "fixed_small", the posterior's (annealed ancestral
            sampling, Song et al. 2021 eq. 47), or "fixed_large", sigma_t² − sigma_{t−1}².
        scale_input: the network sees x_t/√(1 + sigma_t²), of about unit variance at every level.
        conditioning: what the network is given of the level: "timestep", the index in the unstrided
            process, or "log_sigma", the natural logarithm of sigma.
        loss_weighting: weight of the squared error of x_0 at each level: "inverse_variance"
            1/sigma² (the same as plain ε), "edm" 1 + 1/sigma² (the same as plain v), "min_snr"
            min(1/sigma², ``min_snr_gamma``); None is the plain mean squared error of what is
            predicted.
        timestep_map: of a strided process, the steps of the unstrided one: :meth:`respace` sets it.
        original_num_steps: of a strided process, the length of the unstrided one.
        original_sigmas: of a strided process, the levels of the unstrided one, by which the
            timesteps of levels between its steps are found.

    Attributes: ``sigmas``, ``signal_scale`` (ones), ``noise_scale`` (sigmas), ``input_scale``,
    float64 (K,); ``model_timesteps``, float32 (K,); ``timestep_map``, int64 (K,);
    ``num_timesteps`` K; ``prior_std``, the standard deviation x_T is drawn with.

    Raises InputError for noise levels that do not rise and unknown types.
    """

    continuous = False  # t of training_losses is one of the K steps

    def __init__(
        self,
        sigmas: npt.ArrayLike,
        *,
        mean_type: str = "epsilon",
        var_type: str = "fixed_small",
        scale_input: bool = True,
        conditioning: str = "timestep",
        loss_weighting: str | None = None,
        min_snr_gamma: float = 5.0,
        timestep_map: TimestepMap | None = None,
        original_num_steps: int | None = None,
        original_sigmas: npt.ArrayLike | None = None,
    ):
        self.sigmas = _check_sigmas(sigmas)
        self.mean_type = check_choice("mean_type", mean_type, MEAN_TYPES)
        self.var_type = check_choice("var_type", var_type, VAR_TYPES)
        self.conditioning = check_choice("conditioning", conditioning, CONDITIONINGS)
        if loss_weighting is not None:
            check_choice("loss_weighting", loss_weighting, LOSS_WEIGHTINGS)
        check_positive("min_snr_gamma", min_snr_gamma)
        self.scale_input = bool(scale_input)
        self.loss_weighting = loss_weighting
        self.min_snr_gamma = float(min_snr_gamma)

        self.num_timesteps = len(self.sigmas)
        self.original_sigmas, original_num_steps = check_original(
            "original_sigmas", original_sigmas, original_num_steps, _check_sigmas
        )
        self.timestep_map, self.original_num_steps = check_timestep_map(
            timestep_map, original_num_steps, self.num_timesteps
        )

        self.signal_scale = np.ones_like(self.sigmas)
        self.noise_scale = self.sigmas
        total_std = np.hypot(1.0, self.sigmas)
        self.input_scale = 1 / total_std if scale_input else np.ones_like(self.sigmas)
        given = np.log(self.sigmas) if conditioning == "log_sigma" else self.timestep_map
        self.model_timesteps = given.astype(np.float32)
        self.prior_std = float(self.sigmas[-1])
        self.last_variance = 0.0
        self.loss_weights = self._loss_weights(total_std)
        self._tables = Tables(
            {
                "signal": self.signal_scale,
                "sigma": self.sigmas,
                "input_scale": self.input_scale,
                "loss_weight": self.loss_weights,
                "model_timesteps": self.model_timesteps.astype(np.float64),
            }
        )

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t ~ N(x_start, sigma_t²·I): like x_start.

        ``x_start`` (N, ...) float, ``t`` (N,) integer in 0 … K − 1, ``noise`` N(0, I) like x_start,
        drawn when None. Raises InputError for what does not fit; off the CPU a t out of range gives
        NaN instead.
        """
        check_float(x_start, "x_start")
        tables = self._tables.on(x_start)
        noise = draw_like(x_start) if noise is None else noise
        signal, sigma = tables["signal"][:-1], tables["sigma"][:-1]
        return q_sample(x_start, t, signal, sigma, noise=noise)[0]

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0), each of x_start's shape (N, ...).

        Float32, or float64 for float64 x_start. Arguments and errors: :meth:`q_sample`.
        """
        at = self._tables.at(t, x_start, "x_start")
        variance = (at["sigma"] ** 2).expand(x_start.shape)
        return x_start.to(at.dtype), variance, variance.log()

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        step: int | Tensor = 0,
        first_sample: int | Tensor = 0,
    ) -> dict[str, Tensor]:
        """{"loss", "mse"}, each (N,) float: the weighted and the plain squared error, averaged.

        ``model`` is called ``model(x, timesteps, **model_kwargs)`` with x = input_scale_t·x_t and
        float32 (N,) timesteps, and answers x's shape. Arguments and errors: :meth:`q_sample`;
        noise is drawn as :meth:`GaussianDiffusion.training_losses` does.
        """
        check_float(x_start, "x_start")
        tables = self._tables.on(x_start)
        levels, counters = (tables["signal"], tables["sigma"]), Counters(step, seed, first_sample)
        x_t, noise = noised(x_start, t, levels, noise, generator, counters)
        at = self._tables.at_checked(t, x_start)
        network_input = (at["input_scale"] * x_t).to(x_start.dtype)
        timesteps = at["model_timesteps"].flatten().float()
        output = network_output(
            model, network_input, timesteps, model_kwargs, x_start.shape, f"a {PROCESS} process"
        )
        mse = mean_flat((self._target(x_start, noise, at) - output.to(at.dtype)) ** 2)
        return {"loss": at["loss_weight"].flatten() * mse, "mse": mse}

    def at_log_snr(self, values: npt.ArrayLike) -> "VarianceExploding":
        """The process over the levels sigma = e^−λ with these λ = log(1 / sigma), in any order.

        The network's timestep is as ``conditioning`` has it: log sigma, or the index at which log
        sigma, linear from step to step of the unstrided process, is that. Raises InputError for
        levels beyond the first and the last step, and equal ones.
        """
        grid = self.grid()
        log_snr = grid.falling(values)
        return self._strided(np.exp(-log_snr), grid.timesteps_at(log_snr))

    def to_config(self) -> dict[str, Any]:
        """A JSON dictionary from which :meth:`from_config` makes an equal process."""
        names = "mean_type var_type scale_input conditioning loss_weighting min_snr_gamma"
        original = self.original_sigmas
        return {
            **{"process": PROCESS, "sigmas": self.sigmas.tolist()},
            **{name: getattr(self, name) for name in names.split()},
            "timestep_map": self.timestep_map.tolist(),
            "original_num_steps": self.original_num_steps,
            "original_sigmas": None if original is None else original.tolist(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VarianceExploding":
        """The process :meth:`to_config` described. Raises InputError for any other dictionary."""
        return built(cls, PROCESS, config)

    def _strided(self, sigmas: Float64Array, timestep_map: TimestepMap) -> "VarianceExploding":
        """This process over other levels of the same unstrided one."""
        whole = is_whole(self.timestep_map, self.original_num_steps)
        original = self.sigmas if whole else self.original_sigmas
        changes = {"sigmas": sigmas, "timestep_map": timestep_map, "original_sigmas": original}
        return VarianceExploding.from_config(self.to_config() | changes)

    def _at_steps(self, steps: list[int], sections: Any) -> "VarianceExploding":
        return self._strided(self.sigmas[steps], self.timestep_map[steps])

    def grid(self) -> Grid:
        """λ at the unstrided process's steps and between them."""
        original = self.original_sigmas
        return Grid.of(self, None if original is None else -np.log(original))

    def _target(self, x_start: Tensor, noise: Tensor, at: TablesAt) -> Tensor:
        if self.mean_type == "epsilon":
            return noise.to(at.dtype)
        if self.mean_type == "x_start":
            return x_start.to(at.dtype)
        sigma = at["sigma"]
        return (noise - sigma * x_start) / torch.sqrt(1 + sigma**2)

    def _loss_weights(self, total_std: Float64Array) -> Float64Array:
        """(K,): weight of x_0's squared error × how x_0's error follows from the output's."""
        snr = self.sigmas**-2
        weights = {
            "inverse_variance": snr,
            "edm": 1 + snr,
            "min_snr": np.minimum(snr, self.min_snr_gamma),
        }
        if self.loss_weighting is None:
            return np.ones_like(snr)
        # |b| of x_0 = a·x_t + b·output, as methods/table.py has it.
        b = {
            "epsilon": self.sigmas,
            "x_start": np.ones_like(snr),
            "v": self.sigmas / total_std,
        }
        return weights[self.loss_weighting] * b[self.mean_type] ** 2


def check_sigma_range(num_steps: int, sigma_min: float, sigma_max: float) -> None:
    """InputError unless there is room for ``num_steps`` rising noise levels, two or more."""
    if not isinstance(num_steps, int | np.integer) or num_steps < 2:
        raise InputError(f"the number of steps is {num_steps!r}; expected an integer, at least 2")
    if not (is_finite(sigma_min) and is_finite(sigma_max) and 0 < sigma_min < sigma_max):
        raise InputError(
            f"sigma_min is {sigma_min} and sigma_max {sigma_max}; "
            "expected 0 < sigma_min < sigma_max"
        )


def _check_sigmas(sigmas: npt.ArrayLike) -> Float64Array:
    try:
        array = np.array(sigmas, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"sigmas must be an array of numbers, got {sigmas!r}") from None
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"sigmas must be 1-D and not empty, got shape {array.shape}")
    if not np.isfinite(array).all() or array[0] <= 0 or (np.diff(array) <= 0).any():
        raise InputError("sigmas must be finite, positive and rising: smallest noise first")
    return array

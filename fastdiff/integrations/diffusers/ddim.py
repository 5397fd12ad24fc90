"""DDIM (Song et al. 2020, eq. 12 and 16) as diffusers' DDIMScheduler computes it."""

import math
from operator import attrgetter
from typing import Any

import torch
from diffusers.schedulers import scheduling_ddim as stock
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.integrations.diffusers.by_timestep import (
    TimestepRows,
    TimestepScheduler,
    first_rows,
    x_start_columns,
)
from fastdiff.integrations.diffusers.fused import (
    NOT_SET,
    Plan,
    apply,
    misfit,
    noise_misfit,
)
from fastdiff.integrations.diffusers.generators import check_generators

_PREDICTIONS = ("epsilon", "sample", "v_prediction")
_settings = attrgetter(
    *("prediction_type", "thresholding", "clip_sample", "clip_sample_range", "num_train_timesteps")
)


class DDIMScheduler(TimestepScheduler, stock.DDIMScheduler):
    """diffusers' DDIMScheduler with a fused step."""

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next sample and the predicted x_0, (N, C, ...), as a DDIMSchedulerOutput or a tuple.

        ``eta`` is 0 for the deterministic step and 1 for DDPM's variance. Its noise comes from
        ``generator`` or is ``variance_noise``. ``use_clipped_model_output`` derives ε anew from
        the clipped x_0.
        """
        check_generators(generator, sample.shape[:1].numel())
        call = (model_output, timestep, sample, eta, use_clipped_model_output)
        plan = self._plan(*call, generator=generator, variance_noise=variance_noise)
        if isinstance(plan, str):
            return super().step(*call, generator, variance_noise, return_dict)
        rows, row = plan
        noise = variance_noise
        if rows.draws[row] and noise is None:
            noise = randn_tensor(
                sample.shape, generator=generator, device=sample.device, dtype=model_output.dtype
            )
        x_prev, x_start = apply(rows, row, model_output, sample, noise=noise)
        if not return_dict:
            return x_prev, x_start
        return stock.DDIMSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_start)

    def sampling_rows(
        self,
        device: torch.device,
        *,
        doubled_output: bool = False,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
    ) -> TimestepRows | str:
        """All of ``timesteps``, for a Sampler on ``device``, or why it cannot have them."""
        if doubled_output:
            return "its U-Net predicts a variance, which DDIM has no use for"
        return self._make_rows(eta, use_clipped_model_output, device)

    def _plan(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        **_: Any,
    ) -> Plan:
        if self.num_inference_steps is None:
            return NOT_SET
        reason = misfit(model_output, sample)
        if reason is not None:
            return reason
        if not isinstance(eta, int | float):
            return f"eta is a {type(eta).__name__}, not a number"
        if variance_noise is not None:
            if generator is not None:
                return "generator and variance_noise are both given"
            reason = noise_misfit(variance_noise, sample, model_output)
            if reason is not None:
                return reason
        reconsiders = bool(use_clipped_model_output)
        final = self.final_alpha_cumprod
        key = (
            *self._watched(),
            id(final),
            *_settings(self.config),
            self.num_inference_steps,
            eta,
            reconsiders,
            sample.device,
        )
        rows = self._rows(key, lambda: self._make_rows(eta, reconsiders, sample.device))
        if isinstance(rows, str):
            return rows
        row = rows.row(timestep)
        if isinstance(row, str):
            return row
        return rows.refusals[row] or (rows, row)

    def _make_rows(self, eta: float, reconsiders: bool, device: torch.device) -> TimestepRows | str:
        prediction, thresholding, clips, clip_range, trained = _settings(self.config)
        if thresholding:
            return "dynamic thresholding"
        if prediction not in _PREDICTIONS:
            return f"prediction_type {prediction!r}"
        timesteps = self.timesteps.tolist()
        t = torch.tensor(timesteps)
        previous = t - trained // self.num_inference_steps
        alpha = self._alphas_at(timesteps)
        alpha_before = torch.where(
            previous >= 0, self._alphas_at(previous.tolist()), self.final_alpha_cumprod.cpu()
        )
        columns: dict[str, Tensor | float] = {
            "timesteps": t,
            "clip": clip_range if clips else math.inf,
            **x_start_columns(prediction, alpha),
            **_towards_before(alpha, alpha_before, eta, prediction, reconsiders),
        }
        return TimestepRows.of(
            columns,
            device,
            draws=eta > 0,
            x_start_is_output=prediction == "sample",
            kept=(self.timesteps, self.alphas_cumprod, self.final_alpha_cumprod),
            row_of=first_rows(timesteps),
            steps=len(timesteps),
            address=self._address(),
        )


def _towards_before(
    alpha: Tensor, alpha_before: Tensor, eta: float, prediction_type: str, reconsiders: bool
) -> dict[str, Tensor | float]:
    """√ᾱ_{t−1}·x_0 + √(1 − ᾱ_{t−1} − σ²)·ε + σ·z from ᾱ_t and ᾱ_{t−1}, (K,).

    ε is the output's, unclipped, or follows from x_t and the clipped x_0 (``reconsiders``). The
    roots are diffusers' operations in their order, in float32; their products here are float64.
    """
    variance = (1 - alpha_before) / (1 - alpha) * (1 - alpha / alpha_before)
    std = eta * variance**0.5
    towards = ((1 - alpha_before - std**2) ** 0.5).double()
    signal, sigma = (alpha**0.5).double(), ((1 - alpha) ** 0.5).double()
    columns: dict[str, Tensor | float] = {
        "c": (alpha_before**0.5).double(),
        "sigma": std if eta > 0 else 0.0,
    }
    if reconsiders:
        columns["c"] -= towards * signal / sigma
        return columns | {"d": towards / sigma}
    if prediction_type == "epsilon":
        return columns | {"o": towards}
    if prediction_type == "v_prediction":
        return columns | {"d": towards * sigma, "o": towards * signal}
    return columns | {"d": towards / sigma, "o": -towards * signal / sigma}  # sample

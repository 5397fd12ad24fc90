"""DDPM (Ho et al. 2020, eq. 6–7) as diffusers' DDPMScheduler computes it."""

import math
from operator import attrgetter
from typing import Any

import torch
from diffusers.schedulers import scheduling_ddpm as stock
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.integrations.diffusers.by_timestep import (
    TimestepRows,
    TimestepScheduler,
    first_rows,
    x_start_columns,
)
from fastdiff.integrations.diffusers.fused import Plan, apply, misfit
from fastdiff.integrations.diffusers.generators import check_generators

_PREDICTIONS = ("epsilon", "sample", "v_prediction")
_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
_settings = attrgetter(
    *("prediction_type", "variance_type", "thresholding", "clip_sample", "clip_sample_range")
)


class DDPMScheduler(TimestepScheduler, stock.DDPMScheduler):
    """diffusers' DDPMScheduler with a fused step."""

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """x_{t−1} and the predicted x_0, (N, C, ...), as a DDPMSchedulerOutput or a tuple.

        ``model_output`` is (N, C, ...), or (N, 2C, ...) where the variance is learned.
        """
        check_generators(generator, sample.shape[:1].numel())
        plan = self._plan(model_output, timestep, sample)
        if isinstance(plan, str):
            return super().step(model_output, timestep, sample, generator, return_dict)
        rows, row = plan
        noise = None
        if rows.draws[row]:
            noise = randn_tensor(
                sample.shape, generator=generator, device=sample.device, dtype=model_output.dtype
            )
        x_prev, x_start = apply(rows, row, model_output, sample, noise=noise)
        if not return_dict:
            return x_prev, x_start
        return stock.DDPMSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_start)

    def sampling_rows(
        self, device: torch.device, *, doubled_output: bool = False
    ) -> TimestepRows | str:
        """All of ``timesteps``, for a Sampler on ``device``, or why it cannot have them."""
        if doubled_output and self.variance_type != "learned_range":
            return f"its U-Net predicts a variance, and variance_type is {self.variance_type!r}"
        return self._make_rows(doubled_output, device)

    def _plan(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, **_: Any) -> Plan:
        n, c, *size = sample.shape if sample.ndim > 1 else (0, 0)
        learned = self.variance_type == "learned_range"
        doubled = learned and model_output.shape == (n, 2 * c, *size)
        reason = misfit(model_output, sample, doubled=doubled)
        if reason is not None:
            return reason
        key = (
            *self._watched(),
            *_settings(self.config),
            self.variance_type,
            self.custom_timesteps,
            self.num_inference_steps,
            doubled,
            sample.device,
        )
        rows = self._rows(key, lambda: self._make_rows(doubled, sample.device))
        if isinstance(rows, str):
            return rows
        row = rows.row(timestep)
        if isinstance(row, str):
            return row
        return rows.refusals[row] or (rows, row)

    def _make_rows(self, doubled: bool, device: torch.device) -> TimestepRows | str:
        prediction, variance, thresholding, clips, clip_range = _settings(self.config)
        if thresholding:
            return "dynamic thresholding"
        if prediction not in _PREDICTIONS:
            return f"prediction_type {prediction!r}"
        if variance != self.variance_type:
            return f"variance_type is {variance!r}, the attribute {self.variance_type!r}"
        if variance not in _VARIANCES:
            return f"variance_type {variance!r}"
        if variance == "learned_range" and not doubled:
            return "variance_type 'learned_range' without 2C channels"
        timesteps = self.timesteps.tolist()
        t = torch.tensor(timesteps)
        row_of = first_rows(timesteps)
        previous = self._previous(timesteps, row_of)
        alpha = self._alphas_at(timesteps)
        alpha_before = torch.where(torch.tensor(previous) >= 0, self._alphas_at(previous), 1.0)
        columns: dict[str, Tensor | float] = {
            "timesteps": t,
            "clip": clip_range if clips else math.inf,
            **x_start_columns(prediction, alpha),
            **_posterior(alpha, alpha_before, variance),
        }
        columns["sigma"] = torch.where(t > 0, columns["sigma"], 0.0)
        return TimestepRows.of(
            columns,
            device,
            doubled_output=doubled,
            draws=(t > 0).tolist(),
            x_start_is_output=prediction == "sample",
            kept=(self.timesteps, self.alphas_cumprod),
            row_of=row_of,
            steps=len(timesteps),
            address=self._address(),
        )

    def _previous(self, timesteps: list[int], row_of: dict[int, int]) -> list[int]:
        """The timestep after each one in sampling order; −1 after the last."""
        if not (self.custom_timesteps or self.num_inference_steps):
            return [t - 1 for t in timesteps]
        following = [*timesteps[1:], -1]
        return [following[row_of[t]] for t in timesteps]


def _posterior(alpha: Tensor, alpha_before: Tensor, variance_type: str) -> dict[str, Any]:
    """q(x_{t−1} | x_t, x_0) from ᾱ_t and ᾱ_{t−1}, (K,): diffusers' operations in their order, in
    float32, because its differences of numbers close to 1 are part of its results."""
    noise, noise_before = 1 - alpha, 1 - alpha_before
    step_alpha = alpha / alpha_before
    beta = 1 - step_alpha
    variance = torch.clamp(noise_before / noise * beta, min=1e-20)
    columns: dict[str, Any] = {
        "c": alpha_before**0.5 * beta / noise,
        "d": step_alpha**0.5 * noise_before / noise,
    }
    if variance_type == "learned_range":
        logs = {"log_min": torch.log(variance), "log_max": torch.log(beta)}
        return columns | logs | {"sigma": torch.ones_like(beta)}
    if variance_type == "fixed_small_log":
        return columns | {"sigma": torch.exp(0.5 * torch.log(variance))}
    return columns | {"sigma": (beta if variance_type == "fixed_large" else variance) ** 0.5}

"""Euler's method (Karras et al. 2022, arXiv:2206.00364, algorithm 2 without its second order) and
its ancestral form, as diffusers' EulerDiscreteScheduler and EulerAncestralDiscreteScheduler
compute them."""

import math
from typing import Any

import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete as stock_ancestral
from diffusers.schedulers import scheduling_euler_discrete as stock
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.integrations.diffusers.by_sigma import (
    SigmaScheduler,
    exploding_columns,
    is_integer,
)
from fastdiff.integrations.diffusers.fused import Plan, Rows, apply, misfit
from fastdiff.integrations.diffusers.generators import check_generators


class _Euler(SigmaScheduler):
    """x + (x − x_0)/σ·(σ_down − σ) + σ_up·z with the levels σ_down and σ_up of a subclass."""

    _predictions: tuple[str, ...]
    _draws: bool
    config: Any
    is_scale_input_called: bool

    def sampling_rows(self, device: torch.device, *, doubled_output: bool = False) -> Rows | str:
        """All of ``timesteps``, for a Sampler on ``device``, or why it cannot have them."""
        if doubled_output:
            return "its U-Net predicts a variance, which Euler's method has no use for"
        return self._make_rows(device)

    def _plan(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        **_: Any,
    ) -> Plan:
        if is_integer(timestep):
            return "timestep is an integer"
        reason = misfit(model_output, sample)
        if reason is not None:
            return reason
        if s_churn != 0:
            return f"s_churn is {s_churn}"
        key = (*self._watched(), id(self.timesteps), self.config.prediction_type, sample.device)
        rows = self._rows(key, lambda: self._make_rows(sample.device))
        if isinstance(rows, str):
            return rows
        index = self._index(timestep)
        if isinstance(index, str):
            return index
        return rows.refusals[index] or (rows, index)

    def _apply(
        self, plan: tuple[Rows, int], model_output: Tensor, sample: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(x_prev, x_start) in float32 whatever the dtypes, and one step further."""
        if not self.is_scale_input_called:
            stock.logger.warning(
                f"{type(self).__name__}: the network was given a sample that scale_model_input has "
                "not scaled"
            )
        rows, index = plan
        x_prev, x_start = apply(rows, index, model_output, sample.float(), noise=noise)
        self._step_index = index + 1
        return x_prev.to(model_output.dtype), x_start

    def _make_rows(self, device: torch.device) -> Rows | str:
        prediction = self.config.prediction_type
        if prediction not in self._predictions:
            return f"prediction_type {prediction!r}"
        steps = len(self.timesteps)  # of log-linear sigmas there is one more
        sigma, after = self.sigmas.cpu()[:steps], self.sigmas.cpu()[1 : steps + 1]
        down, up = self._levels(sigma, after)
        change = (down - sigma).double() / sigma
        columns = exploding_columns(prediction, sigma)
        columns |= {"timesteps": self.timesteps.cpu(), "c": -change, "d": 1 + change, "sigma": up}
        return Rows.of(
            columns,
            device,
            draws=self._draws,
            x_start_is_output=prediction in ("sample", "original_sample"),
            kept=(self.sigmas, self.timesteps),
        )

    def _levels(self, sigma: Tensor, after: Tensor) -> tuple[Tensor, Tensor | float]:
        """(σ_down, σ_up) of a step from σ to the one after it, (K,)."""
        raise NotImplementedError


class EulerDiscreteScheduler(_Euler, stock.EulerDiscreteScheduler):
    """diffusers' EulerDiscreteScheduler with a fused step."""

    _predictions = ("epsilon", "sample", "original_sample", "v_prediction")
    _draws = False

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next sample and the predicted x_0, (N, C, ...), as an EulerDiscreteSchedulerOutput or
        a tuple.

        ``s_churn`` and what belongs to it, with which diffusers' own step is taken, are those of
        Karras et al.; its noise comes from ``generator``.
        """
        check_generators(generator, sample.shape[:1].numel())
        call = (model_output, timestep, sample, s_churn)
        plan = self._plan(*call)
        if isinstance(plan, str):
            return super().step(*call, s_tmin, s_tmax, s_noise, generator, return_dict)
        x_prev, x_start = self._apply(plan, model_output, sample, None)
        if not return_dict:
            return x_prev, x_start
        return stock.EulerDiscreteSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_start)

    def _levels(self, sigma: Tensor, after: Tensor) -> tuple[Tensor, Tensor | float]:
        return after, 0.0


class EulerAncestralDiscreteScheduler(_Euler, stock_ancestral.EulerAncestralDiscreteScheduler):
    """diffusers' EulerAncestralDiscreteScheduler with a fused step."""

    _predictions = ("epsilon", "v_prediction")
    _draws = True

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next sample and the predicted x_0, (N, C, ...), as an
        EulerAncestralDiscreteSchedulerOutput or a tuple; the noise comes from ``generator``."""
        check_generators(generator, sample.shape[:1].numel())
        plan = self._plan(model_output, timestep, sample)
        if isinstance(plan, str):
            return super().step(model_output, timestep, sample, generator, return_dict)
        noise = randn_tensor(
            sample.shape, generator=generator, device=sample.device, dtype=model_output.dtype
        )
        x_prev, x_start = self._apply(plan, model_output, sample, noise)
        if not return_dict:
            return x_prev, x_start
        return stock_ancestral.EulerAncestralDiscreteSchedulerOutput(
            prev_sample=x_prev, pred_original_sample=x_start
        )

    def _levels(self, sigma: Tensor, after: Tensor) -> tuple[Tensor, Tensor | float]:
        # diffusers' operations in their order, in float32: its differences are part of its results.
        up = (after**2 * (sigma**2 - after**2) / sigma**2) ** 0.5
        return (after**2 - up**2) ** 0.5, up

"""Heun's method (Karras et al. 2022, arXiv:2206.00364, algorithm 1) as diffusers'
HeunDiscreteScheduler computes it: two calls a step."""

import math
from operator import attrgetter
from typing import Any

import torch
from diffusers.schedulers import scheduling_heun_discrete as stock
from torch import Tensor

from fastdiff.integrations.diffusers.by_sigma import SigmaScheduler, exploding_columns
from fastdiff.integrations.diffusers.fused import Plan, Rows, apply, misfit

_PREDICTIONS = ("epsilon", "sample", "v_prediction")
_settings = attrgetter("prediction_type", "clip_sample", "clip_sample_range")


class HeunDiscreteScheduler(SigmaScheduler, stock.HeunDiscreteScheduler):
    """diffusers' HeunDiscreteScheduler with a fused step.

    The first call of a step is Euler's. Its derivative (x − x_0)/σ, its dt and its x are attributes
    until the second call, which goes from that x by the mean of both derivatives.
    """

    prev_derivative: Tensor | None
    dt: Tensor | None
    sample: Tensor | None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> Any:
        """The next sample, or that at which the second derivative is to be taken, and the predicted
        x_0, (N, C, ...), as a HeunDiscreteSchedulerOutput or a tuple."""
        plan = self._plan(model_output, timestep, sample)
        if isinstance(plan, str):
            return super().step(model_output, timestep, sample, return_dict)
        rows, index = plan
        if self.state_in_first_order:
            dtype = torch.promote_types(sample.dtype, model_output.dtype)
            derivative = torch.empty_like(sample, dtype=dtype)
            x_prev, x_start = apply(rows, index, model_output, sample, memory=[derivative])
            self.prev_derivative, self.sample = derivative, sample
            self.dt = self.sigmas[index + 1] - self.sigmas[index]
        else:
            assert self.prev_derivative is not None and self.sample is not None
            memory = [self.prev_derivative, self.sample]
            x_prev, x_start = apply(rows, index, model_output, sample, memory=memory)
            self.prev_derivative = self.sample = self.dt = None
        self._step_index = index + 1
        if not return_dict:
            return x_prev, x_start
        return stock.HeunDiscreteSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_start)

    def sampling_rows(self, device: torch.device, *, doubled_output: bool = False) -> Rows | str:
        """All of ``timesteps``, for a Sampler on ``device``, or why it cannot have them."""
        if doubled_output:
            return "its U-Net predicts a variance, which Heun's method has no use for"
        first, second = self._columns(True), self._columns(False)
        if isinstance(first, str) or isinstance(second, str):
            return str(first)
        # In one slot, x + ½·dt·derivative: all that the second call reads of the first.
        half = first["c"] / 2
        first |= {"slot": 0.0, "k": half, "q": 1 - half}
        second |= {"e0": 1.0}
        begins = torch.arange(len(self.timesteps)) % 2 == 0
        names = first | second
        columns = {
            name: torch.where(
                begins, *(torch.as_tensor(c.get(name, other)) for c in (first, second))
            )
            for name, other in {n: -1.0 if n == "slot" else 0.0 for n in names}.items()
        }
        return self._rows_of(columns, device)

    def _plan(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, **_: Any
    ) -> Plan:
        reason = misfit(model_output, sample)
        if reason is not None:
            return reason
        first = self.state_in_first_order
        key = (
            *self._watched(),
            id(self.timesteps),
            *_settings(self.config),
            sample.device,
            first,
        )
        rows = self._rows(key, lambda: self._make_rows(sample.device, first=first))
        if isinstance(rows, str):
            return rows
        index = self._index(timestep)
        if isinstance(index, str):
            return index
        if not first:
            if self.dt != self.sigmas[index] - self.sigmas[index - 1]:
                return f"step {index} does not follow on the one before"
            like = [(x.shape, x.dtype, x.device) for x in (sample, self.sample) if x is not None]
            if len(like) < 2 or like[0] != like[1]:
                return "sample is unlike the one before"
        return rows.refusals[index] or (rows, index)

    def _make_rows(self, device: torch.device, *, first: bool) -> Rows | str:
        columns = self._columns(first)
        if isinstance(columns, str):
            return columns
        if first:
            columns |= {"slot": 0.0, "k": -1 / columns["at"], "q": 1 / columns["at"]}
        else:
            columns |= {"e0": columns["dt"] / 2, "e1": 1.0}
        return self._rows_of(columns, device)

    def _rows_of(self, columns: dict[str, Any], device: torch.device) -> Rows:
        for name in ("at", "dt"):
            columns.pop(name)
        return Rows.of(
            columns,
            device,
            x_start_is_output=self.config.prediction_type == "sample",
            kept=(self.sigmas, self.timesteps),
        )

    def _columns(self, first: bool) -> dict[str, Any] | str:
        """Of the first calls, or the second ones, at each of ``timesteps``: all but what is kept.

        ``at``: σ of the sample; ``dt``: the change of σ by the step.
        """
        prediction, clips, clip_range = _settings(self.config)
        if prediction not in _PREDICTIONS:
            return f"prediction_type {prediction!r}"
        sigmas = self.sigmas.cpu()
        at, before, after = sigmas[:-1], sigmas.roll(1)[:-1], sigmas[1:]
        dt = (after - at if first else at - before).double()
        columns = exploding_columns(prediction, at)
        columns |= {"timesteps": self.timesteps.cpu(), "clip": clip_range if clips else math.inf}
        change = dt / at if first else dt / (2 * at.double())
        columns |= {"c": -change, "d": 1 + change if first else change}
        return columns | {"at": at.double(), "dt": dt}

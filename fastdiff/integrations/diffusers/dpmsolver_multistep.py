"""DPM-Solver++ and its SDE form (Lu et al. 2022, arXiv:2211.01095), of the first and second order,
as diffusers' DPMSolverMultistepScheduler computes them."""

from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from diffusers.schedulers import scheduling_dpmsolver_multistep as stock
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.integrations.diffusers.fused import (
    NOT_SET,
    FusedScheduler,
    Plan,
    Rows,
    apply,
    combine,
    make_table,
    misfit,
    version,
)
from fastdiff.integrations.diffusers.generators import check_generators

_ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++")
_PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
_settings = attrgetter(
    *("prediction_type", "algorithm_type", "solver_type", "thresholding", "use_flow_sigmas")
)


class DPMSolverMultistepScheduler(FusedScheduler, stock.DPMSolverMultistepScheduler):
    """diffusers' DPMSolverMultistepScheduler with a fused step."""

    lower_order_nums: int

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next sample, (N, C, ...), as a SchedulerOutput or a tuple.

        The noise of the ``sde-`` algorithms comes from ``generator`` or is ``variance_noise``.
        """
        check_generators(generator, sample.shape[:1].numel())
        plan = self._plan(model_output, timestep, sample, variance_noise=variance_noise)
        if isinstance(plan, str):
            arguments = (model_output, timestep, sample, generator, variance_noise, return_dict)
            return super().step(*arguments)
        rows, row = plan
        noise = None
        if rows.draws[row]:
            noise = variance_noise
            if noise is None:
                noise = randn_tensor(
                    sample.shape, generator=generator, device=sample.device, dtype=torch.float32
                )
        steps = len(self.timesteps)
        before = self.model_outputs[-1] if row >= steps else None
        x_prev, converted = apply(
            rows, row, self._mean(model_output), sample, noise=noise, x_start_before=before
        )
        self.model_outputs.append(converted)
        del self.model_outputs[0]
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)
        self._step_index = row % steps + 1
        x_prev = x_prev.to(converted.dtype)
        return SchedulerOutput(prev_sample=x_prev) if return_dict else (x_prev,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """α·x_0 + σ·noise at these timesteps, (N, ...); float32 inside whatever the dtype."""
        device = original_samples.device
        dtype = torch.float64 if original_samples.dtype == torch.float64 else torch.float32
        scales = self._sigma_to_alpha_sigma_t(self.sigmas.to(device, dtype))
        if self.begin_index is None:
            index = _indices(self.timesteps.to(device), timesteps.to(device))
        else:  # inpainting after the first step, image-to-image before it
            at = self.begin_index if self.step_index is None else self.step_index
            index = torch.full(timesteps.shape, at, device=device)
        return combine(original_samples, noise, index, *scales)

    def sampling_rows(self, device: torch.device, *, doubled_output: bool = False) -> Rows | str:
        """All of ``timesteps``, for a Sampler on ``device``, or why it cannot have them."""
        if doubled_output:
            return "its U-Net predicts a variance, which DPM-Solver has no use for"
        made, steps = self._make_rows(device), len(self.timesteps)
        if isinstance(made, str):
            return made
        orders = [self._order(index, index) for index in range(steps)]
        if max(orders) == 3:
            return "some of its steps are of the third order"
        chosen = [index + (order - 1) * steps for index, order in enumerate(orders)]
        table = made.table.rows(chosen, timesteps=self.timesteps)
        return replace(
            made,
            table=table,
            refusals=[made.refusals[i] for i in chosen],
            draws=[made.draws[i] for i in chosen],
        )

    def _plan(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        variance_noise: Tensor | None = None,
        **_: Any,
    ) -> Plan:
        if self.num_inference_steps is None:
            return NOT_SET
        reason = misfit(self._mean(model_output), sample)
        if reason is not None:
            return reason
        if variance_noise is not None and variance_noise.shape != sample.shape:
            return f"variance_noise has shape {tuple(variance_noise.shape)}, unlike sample"
        key = (id(self.sigmas), version(self.sigmas), *_settings(self.config), sample.device)
        rows = self._rows(key, lambda: self._make_rows(sample.device))
        if isinstance(rows, str):
            return rows
        index, steps = self._index(timestep), len(self.timesteps)
        if not (0 <= index < steps and 2 * steps == len(rows.refusals)):
            return f"step {index} of {steps} has no noise level"
        order = self._order(index, self.lower_order_nums)
        if order == 3:
            return "this step is of the third order"
        if order == 2 and getattr(self.model_outputs[-1], "shape", None) != sample.shape:
            return "the model output before is missing, or of another shape"
        row = index + (order - 1) * steps
        return rows.refusals[row] or (rows, row)

    def _mean(self, model_output: Tensor) -> Tensor:
        """The output without the learned variance: three channels, as diffusers has it."""
        learned = self.config.variance_type in ("learned", "learned_range")
        if learned and self.config.prediction_type == "epsilon":
            return model_output[:, :3]
        return model_output

    def _index(self, timestep: int | Tensor) -> int:
        if self.step_index is not None:
            return self.step_index
        if self.begin_index is not None:
            return self.begin_index
        if isinstance(timestep, Tensor):
            timestep = timestep.to(self.timesteps.device)
        return self.index_for_timestep(timestep)

    def _order(self, index: int, taken: int) -> int:
        """The order that diffusers takes this step with; ``taken``: how many steps before it."""
        config, left = self.config, len(self.timesteps) - index
        lowers = config.lower_order_final and len(self.timesteps) < 15
        ends_first = config.euler_at_final or lowers or config.final_sigmas_type == "zero"
        if config.solver_order == 1 or taken < 1 or (left == 1 and ends_first):
            return 1
        if config.solver_order == 2 or taken < 2 or (left == 2 and lowers):
            return 2
        return 3

    def _make_rows(self, device: torch.device) -> Rows | str:
        """K rows of the first order, then K of the second."""
        prediction, algorithm, solver, thresholding, _ = _settings(self.config)
        if thresholding:
            return "dynamic thresholding"
        if prediction not in _PREDICTIONS:
            return f"prediction_type {prediction!r}"
        if algorithm not in _ALGORITHMS or solver not in ("midpoint", "heun"):
            return f"algorithm_type {algorithm!r} with solver_type {solver!r}"
        sigmas = self.sigmas.cpu()
        alpha, sigma = self._sigma_to_alpha_sigma_t(sigmas)
        predicted = _x_start_columns(prediction, alpha[:-1], sigma[:-1], sigmas[:-1])
        first, second = _updates(alpha, sigma, algorithm, solver)
        both = {
            name: torch.cat([torch.as_tensor(v).expand(len(sigmas) - 1) for v in (one, two)])
            for name, one, two in [
                *((name, value, value) for name, value in predicted.items()),
                *((name, first.get(name, 0.0), value) for name, value in second.items()),
            ]
        }
        both["timesteps"] = torch.arange(len(sigmas) - 1).repeat(2)
        table, refusals = make_table(both, device)
        return Rows(
            table=table,
            refusals=refusals,
            draws=[algorithm == "sde-dpmsolver++"] * len(refusals),
            x_start_is_output=prediction == "sample",
            kept=(self.sigmas,),
        )


def _x_start_columns(
    prediction_type: str, alpha: Tensor, sigma: Tensor, raw_sigma: Tensor
) -> dict[str, Any]:
    """x_0 = a·x_t + b·output."""
    if prediction_type == "epsilon":
        return {"a": 1 / alpha, "b": -sigma / alpha}
    if prediction_type == "v_prediction":
        return {"a": alpha, "b": -sigma}
    if prediction_type == "flow_prediction":
        return {"a": 1.0, "b": -raw_sigma}
    return {"a": 0.0, "b": 1.0}  # sample


def _updates(
    alphas: Tensor, sigmas: Tensor, algorithm: str, solver: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first-order and the second-order update from each of K + 1 levels to the next.

    x = d·x_s + k0·D0 + k1·D1 + std·z with D0 the prediction at s and D1 its difference from the
    one before, over r0. diffusers' operations in their order, in float32: its differences of
    logarithms are part of its results.
    """
    lambdas = torch.log(alphas) - torch.log(sigmas)
    sigma_s, lambda_s = sigmas[:-1], lambdas[:-1]
    alpha, sigma = alphas[1:], sigmas[1:]
    h = lambdas[1:] - lambda_s
    r0 = (lambda_s - lambdas.roll(1)[:-1]) / h  # as in diffusers, the last level precedes the first
    std: Tensor | float = 0.0
    if algorithm == "dpmsolver++":
        d, k0 = sigma / sigma_s, -(alpha * (torch.exp(-h) - 1.0))
        heun = alpha * ((torch.exp(-h) - 1.0) / h + 1.0)
    else:  # sde-dpmsolver++
        gained = 1.0 - torch.exp(-2.0 * h)
        d, k0 = sigma / sigma_s * torch.exp(-h), alpha * gained
        heun = alpha * (gained / (-2.0 * h) + 1.0)
        std = sigma * torch.sqrt(gained)
    e = -((0.5 * k0 if solver == "midpoint" else heun) / r0).double()
    first = {"c": k0, "d": d, "sigma": std, "slot": 0.0, "k": 1.0}  # each row keeps its x_0
    return first, first | {"c": k0.double() - e, "e0": e}


def _indices(schedule: Tensor, timesteps: Tensor) -> Tensor:
    """Of each timestep (N,) its place in the schedule (K,), without waiting for the device.

    As diffusers has it: the second place of those that occur more than once, and the last for
    those that do not occur.
    """
    equal = schedule == timesteps.reshape(-1, 1)  # (N, K)
    seen = equal.cumsum(1)
    place = torch.where(seen[:, -1:] > 1, equal & (seen == 2), equal).int().argmax(1)
    return torch.where(seen[:, -1] == 0, len(schedule) - 1, place)

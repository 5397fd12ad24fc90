"""DPM-Solver++ and its SDE form (Lu et al. 2022, arXiv:2211.01095), of the first to third order, as
diffusers' DPMSolverMultistepScheduler computes them."""

from operator import attrgetter
from typing import Any

import torch
from diffusers.schedulers import scheduling_dpmsolver_multistep as stock
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.integrations.diffusers.fused import NOT_SET, Plan, Rows, apply, misfit
from fastdiff.integrations.diffusers.generators import check_generators
from fastdiff.integrations.diffusers.multistep import (
    PREDICTIONS,
    Columns,
    MultistepScheduler,
    chosen_rows,
    in_blocks,
    kept_in_turns,
    x_start_columns,
)

_ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++")
_settings = attrgetter(
    *("prediction_type", "algorithm_type", "solver_type", "solver_order"),
    *("thresholding", "use_flow_sigmas"),
)


class DPMSolverMultistepScheduler(MultistepScheduler, stock.DPMSolverMultistepScheduler):
    """diffusers' DPMSolverMultistepScheduler with a fused step."""

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
        order, index = divmod(row, len(self.timesteps))
        before = self._before(order)
        x_prev, converted = apply(
            rows, row, self._mean(model_output), sample, noise=noise, memory=before
        )
        self._remember(converted, index)
        x_prev = x_prev.to(converted.dtype)
        return SchedulerOutput(prev_sample=x_prev) if return_dict else (x_prev,)

    def sampling_rows(self, device: torch.device, *, doubled_output: bool = False) -> Rows | str:
        """All of ``timesteps``, for a Sampler on ``device``, or why it cannot have them."""
        if doubled_output:
            return "its U-Net predicts a variance, which DPM-Solver has no use for"
        columns, steps = self._columns(), len(self.timesteps)
        if isinstance(columns, str):
            return columns
        chosen = kept_in_turns(chosen_rows(columns, self._rows_by_order()), steps)
        return self._rows_of(chosen, device)

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
        key = (*self._watched(), *_settings(self.config), sample.device)
        rows = self._rows(key, lambda: self._make_rows(sample.device))
        if isinstance(rows, str):
            return rows
        return self._row_by_order(rows, timestep, sample)

    def _mean(self, model_output: Tensor) -> Tensor:
        """The output without the learned variance: three channels, as diffusers has it."""
        learned = self.config.variance_type in ("learned", "learned_range")
        if learned and self.config.prediction_type == "epsilon":
            return model_output[:, :3]
        return model_output

    def _ends_first(self) -> bool:
        return self.config.euler_at_final or self.config.final_sigmas_type == "zero"

    def _rows_of(self, columns: Columns, device: torch.device) -> Rows:
        return Rows.of(
            columns,
            device,
            draws=self.config.algorithm_type == "sde-dpmsolver++",
            x_start_is_output=self.config.prediction_type == "sample",
            kept=(self.sigmas,),
        )

    def _columns(self) -> Columns | str:
        """Of K rows of the first order, then K of each order up to the solver's."""
        prediction, algorithm, solver, order, thresholding, _ = _settings(self.config)
        if thresholding:
            return "dynamic thresholding"
        if prediction not in PREDICTIONS:
            return f"prediction_type {prediction!r}"
        if order not in (1, 2, 3):
            return f"solver_order {order}"
        if algorithm not in _ALGORITHMS or solver not in ("midpoint", "heun"):
            return f"algorithm_type {algorithm!r} with solver_type {solver!r}"
        sigmas = self.sigmas.cpu()
        alpha, sigma = self._sigma_to_alpha_sigma_t(sigmas)
        predicted = x_start_columns(prediction, alpha[:-1], sigma[:-1], sigmas[:-1])
        steps = len(sigmas) - 1
        shared = predicted | {"timesteps": self.timesteps.cpu()}
        updates = _updates(alpha, sigma, algorithm, solver)[:order]
        blocks = [shared | update for update in updates]
        return in_blocks(blocks, steps)


def _updates(alphas: Tensor, sigmas: Tensor, algorithm: str, solver: str) -> list[Columns]:
    """The updates of the first to third order from each of K + 1 levels to the next.

    x = d·x_s + k0·D0 + k1·D1 + k2·D2 + std·z with D0 the prediction at s, and D1 and D2 made of
    its differences from the ones before and theirs, over r0 and r1. diffusers' operations in their
    order, in float32: its differences of logarithms are part of its results.
    """
    lambdas = torch.log(alphas) - torch.log(sigmas)
    sigma_s, lambda_s = sigmas[:-1], lambdas[:-1]
    alpha, sigma = alphas[1:], sigmas[1:]
    h = lambdas[1:] - lambda_s
    # As in diffusers, the last levels precede the first.
    r0 = (lambda_s - lambdas.roll(1)[:-1]) / h
    r1 = (lambdas.roll(1)[:-1] - lambdas.roll(2)[:-1]) / h
    std: Tensor | float = 0.0
    if algorithm == "dpmsolver++":
        d, k0 = sigma / sigma_s, -(alpha * (torch.exp(-h) - 1.0))
        k1 = alpha * ((torch.exp(-h) - 1.0) / h + 1.0)
        k2 = -(alpha * ((torch.exp(-h) - 1.0 + h) / h**2 - 0.5))
    else:  # sde-dpmsolver++
        gained = 1.0 - torch.exp(-2.0 * h)
        d, k0 = sigma / sigma_s * torch.exp(-h), alpha * gained
        k1 = alpha * (gained / (-2.0 * h) + 1.0)
        k2 = alpha * ((gained - 2.0 * h) / (2.0 * h) ** 2 - 0.5)
        std = sigma * torch.sqrt(gained)
    first = {"d": d, "sigma": std, "c": k0}
    e = -((0.5 * k0 if solver == "midpoint" else k1) / r0).double()
    second = {"d": d, "sigma": std, "c": k0.double() - e, "e0": e}
    # D1 = D1_0 + r0·s·(D1_0 − D1_1) and D2 = s·(D1_0 − D1_1) with s = 1/(r0 + r1),
    # D1_0 = (m0 − m1)/r0 and D1_1 = (m1 − m2)/r1
    curve = ((k1 * r0 + k2) / (r0 + r1)).double()
    newer, older = (k1 + curve) / r0, -curve / r1
    third = {"d": d, "sigma": std, "c": k0 + newer, "e0": older - newer, "e1": -older}
    return [first, second, third]

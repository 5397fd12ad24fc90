"""DEIS (Zhang & Chen 2022, arXiv:2204.13902) with polynomials in log ρ, of the first to third
order, as diffusers' DEISMultistepScheduler computes it."""

from operator import attrgetter
from typing import Any

import numpy as np
import torch
from diffusers.schedulers import scheduling_deis_multistep as stock
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.fused import NOT_SET, Plan, Rows, apply, misfit
from fastdiff.integrations.diffusers.multistep import (
    PREDICTIONS,
    Columns,
    MultistepScheduler,
    chosen_rows,
    in_blocks,
    in_x_start,
    kept_in_turns,
    x_start_columns,
)

_settings = attrgetter(
    *("prediction_type", "algorithm_type", "solver_type", "solver_order"),
    *("thresholding", "use_flow_sigmas"),
)


class DEISMultistepScheduler(MultistepScheduler, stock.DEISMultistepScheduler):
    """diffusers' DEISMultistepScheduler with a fused step."""

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> Any:
        """The next sample, (N, C, ...), as a SchedulerOutput or a tuple."""
        plan = self._plan(model_output, timestep, sample)
        if isinstance(plan, str):
            return super().step(model_output, timestep, sample, return_dict)
        rows, row = plan
        order, index = divmod(row, len(self.timesteps))
        x_prev, eps = apply(rows, row, model_output, sample, memory=self._before(order))
        self._remember(eps, index)
        return SchedulerOutput(prev_sample=x_prev) if return_dict else (x_prev,)

    def sampling_rows(self, device: torch.device, *, doubled_output: bool = False) -> Rows | str:
        """All of ``timesteps``, for a Sampler on ``device``, or why it cannot have them."""
        if doubled_output:
            return "its U-Net predicts a variance, which DEIS has no use for"
        columns, steps = self._columns(), len(self.timesteps)
        if isinstance(columns, str):
            return columns
        predicted, _ = self._predicted()
        chosen = in_x_start(chosen_rows(columns, self._rows_by_order()), predicted)
        return self._rows_of(kept_in_turns(chosen, steps), device)

    def _plan(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, **_: Any) -> Plan:
        if self.num_inference_steps is None:
            return NOT_SET
        reason = misfit(model_output, sample)
        if reason is not None:
            return reason
        key = (*self._watched(), *_settings(self.config), sample.device)
        rows = self._rows(key, lambda: self._make_rows(sample.device))
        if isinstance(rows, str):
            return rows
        return self._row_by_order(rows, timestep, sample)

    def _rows_of(self, columns: Columns, device: torch.device) -> Rows:
        return Rows.of(columns, device, kept=(self.sigmas,))

    def _predicted(self) -> tuple[Columns, Columns]:
        """The a and b of x_0, and those of ε = (x_t − α·x_0)/σ, at each of ``timesteps``."""
        prediction, sigmas = self.config.prediction_type, self.sigmas.cpu()[:-1]
        alpha, sigma = self._sigma_to_alpha_sigma_t(sigmas)
        x_start = x_start_columns(prediction, alpha, sigma, sigmas)
        # diffusers divides a flow by the σ of its list, which differs where that is no flow's.
        sigma = (sigmas if prediction == "flow_prediction" else sigma).double()
        alpha = alpha.double()
        eps = {"a": (1 - alpha * x_start["a"]) / sigma, "b": -alpha * x_start["b"] / sigma}
        return x_start, eps

    def _columns(self) -> Columns | str:
        """In ε, of K rows of the first order, then K of each order up to the solver's."""
        prediction, algorithm, solver, order, thresholding, _ = _settings(self.config)
        if thresholding:
            return "dynamic thresholding"
        if prediction not in PREDICTIONS:
            return f"prediction_type {prediction!r}"
        if order not in (1, 2, 3):
            return f"solver_order {order}"
        if (algorithm, solver) != ("deis", "logrho"):
            return f"algorithm_type {algorithm!r} with solver_type {solver!r}"
        alpha, sigma = self._sigma_to_alpha_sigma_t(self.sigmas.cpu())
        steps = len(sigma) - 1
        shared = self._predicted()[1] | {"timesteps": self.timesteps.cpu()}
        blocks = [shared | update for update in _updates(alpha, sigma)[:order]]
        return in_blocks(blocks, steps)


def _updates(alphas: Tensor, sigmas: Tensor) -> list[Columns]:
    """The updates of the first to third order, in ε, from each of K + 1 levels to the next.

    x_t = α_t·(x_s/α_s + Σ_j ε_j·∫ l_j dρ) from ρ_s to ρ_t, with ρ = σ/α and l_j the Lagrange
    polynomial in log ρ that is one at the j-th level before. diffusers' operations in their order,
    in float32: its differences are part of its results.
    """
    lambdas = torch.log(alphas) - torch.log(sigmas)
    h = lambdas[1:] - lambdas[:-1]
    rhos = sigmas / alphas
    t, s0 = rhos[1:], rhos[:-1]
    s1, s2 = rhos.roll(1)[:-1], rhos.roll(2)[:-1]  # as in diffusers, the last precede the first
    alpha_t, alpha_s = alphas[1:], alphas[:-1]
    first = {"d": alpha_t / alpha_s, "c": -(sigmas[1:] * (torch.exp(h) - 1.0))}
    d = alpha_t.double() / alpha_s
    linear = [_line(t, *nodes) - _line(s0, *nodes) for nodes in ((s0, s1), (s1, s0))]
    second = {"d": d, "c": alpha_t.double() * linear[0], "e0": alpha_t.double() * linear[1]}
    turns = ((s0, s1, s2), (s1, s2, s0), (s2, s0, s1))
    newest, older, oldest = (
        alpha_t.double() * (_parabola(t, *nodes) - _parabola(s0, *nodes)) for nodes in turns
    )
    return [first, second, {"d": d, "c": newest, "e0": older, "e1": oldest}]


def _line(t: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """∫ (log t − log c)/(log b − log c) dt."""
    return t * (-_log(c) + _log(t) - 1) / (_log(b) - _log(c))


def _parabola(t: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """∫ (log t − log c)(log t − log d) / ((log b − log c)(log b − log d)) dt."""
    log_t, log_b, log_c, log_d = (_log(rho) for rho in (t, b, c, d))
    integral = log_c * (log_d - log_t + 1) - log_d * log_t + log_d + log_t**2 - 2 * log_t + 2
    return t * integral / ((log_b - log_c) * (log_b - log_d))


def _log(rho: Tensor) -> Tensor:
    """numpy's, as in diffusers."""
    return torch.from_numpy(np.log(rho.numpy()))

"""UniPC (Zhao et al. 2023, arXiv:2302.04867), of the first to third order, as diffusers'
UniPCMultistepScheduler computes it."""

import weakref
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from diffusers.schedulers import scheduling_unipc_multistep as stock
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.fused import (
    NOT_SET,
    Plan,
    Rows,
    apply,
    misfit,
    version,
)
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

ORDERS = (1, 2, 3)
_settings = attrgetter(
    *("prediction_type", "solver_type", "thresholding", "use_flow_sigmas", "solver_order")
)


@dataclass(frozen=True, slots=True)
class CorrectedRows(Rows):
    """``correction``: of each row the factors by which the corrected sample is x plus the converted
    output and the three before, the newest first."""

    correction: list[list[float]]


@dataclass(frozen=True, slots=True)
class _Corrected:
    """x + Σ factor·prediction, which is the sample that a step corrected x to."""

    x: Tensor
    terms: list[tuple[float, Tensor]]

    def sample(self) -> Tensor:
        total = self.x.float()
        for factor, prediction in self.terms:
            total = total + factor * prediction.float()
        return total.to(self.x.dtype)


class UniPCMultistepScheduler(MultistepScheduler, stock.UniPCMultistepScheduler):
    """diffusers' UniPCMultistepScheduler with a fused step.

    A call corrects the sample that the last one predicted, and predicts the next. Correction and
    prediction start from the same sample and differ by a sum of predictions, so that a row says
    the call where ``sample`` is what the last call returned. The corrected sample itself is
    computed where ``last_sample`` is read.
    """

    this_order: int
    timestep_list: list[Any]
    _returned: tuple[weakref.ref[Tensor], int] | None = None

    @property
    def last_sample(self) -> Tensor | None:
        """The corrected sample that the last step went on from."""
        held = self.__dict__["last_sample"]
        if isinstance(held, _Corrected):
            held = self.__dict__["last_sample"] = held.sample()
        return held

    @last_sample.setter
    def last_sample(self, sample: Any) -> None:
        self.__dict__["last_sample"] = sample

    def __getstate__(self) -> dict[str, Any]:
        """Without what the last step returned: a copy's samples are copies too."""
        return super().__getstate__() | {"_returned": None}

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
            output = super().step(model_output, timestep, sample, return_dict)
            self._returned = weakref.ref(output[0]), version(output[0])
            return output
        rows, row = plan
        assert isinstance(rows, CorrectedRows)
        block, index = divmod(row, len(self.timesteps))
        before = self._before(max(divmod(block, len(ORDERS))))
        x_prev, converted = apply(rows, row, model_output, sample, memory=before)
        terms = [
            (factor, prediction)
            for factor, prediction in zip(rows.correction[row], [converted, *before], strict=False)
            if factor
        ]
        self.last_sample = _Corrected(sample, terms) if terms else sample
        self.this_order = self._order(index, self.lower_order_nums)
        self._remember(converted, index)
        self.timestep_list.append(timestep)
        del self.timestep_list[0]
        self._returned = weakref.ref(x_prev), version(x_prev)
        return SchedulerOutput(prev_sample=x_prev) if return_dict else (x_prev,)

    def sampling_rows(self, device: torch.device, *, doubled_output: bool = False) -> Rows | str:
        """All of ``timesteps``, for a Sampler on ``device``, or why it cannot have them."""
        if doubled_output:
            return "its U-Net predicts a variance, which UniPC has no use for"
        columns, steps = self._columns(), len(self.timesteps)
        if isinstance(columns, str):
            return columns
        orders = [self._order(index, index) for index in range(steps)]
        corrects = [index > 0 and index - 1 not in self.disable_corrector for index in range(steps)]
        rows = [
            self._row(index, orders[index], orders[index - 1] if corrects[index] else 0)
            for index in range(steps)
        ]
        chosen = chosen_rows(columns, rows)
        if not self.predict_x0:
            chosen = in_x_start(chosen, self._predicted(in_x0=True))
        return self._rows_of(kept_in_turns(chosen, steps), device)

    def _plan(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, **_: Any) -> Plan:
        if self.num_inference_steps is None:
            return NOT_SET
        reason = misfit(model_output, sample)
        if reason is not None:
            return reason
        if model_output.dtype != sample.dtype:
            return f"model_output is {model_output.dtype}, sample {sample.dtype}"
        key = (*self._watched(), *_settings(self.config), self.predict_x0, bool(self.solver_p))
        rows = self._rows((*key, sample.device), lambda: self._make_rows(sample.device))
        if isinstance(rows, str):
            return rows
        index = self._index(timestep)
        if isinstance(index, str):
            return index
        order, corrected = self._order(index, self.lower_order_nums), 0
        if (
            index > 0
            and index - 1 not in self.disable_corrector
            and self.__dict__["last_sample"] is not None
        ):
            corrected = self.this_order
            if not self._is_returned(sample):
                return "sample is not the one that the last step returned"
        reason = self._lacks(max(order - 1, corrected), sample)
        row = self._row(index, order, corrected)
        return reason or rows.refusals[row] or (rows, row)

    def _is_returned(self, sample: Tensor) -> bool:
        """Whether it is what the last step returned, unchanged."""
        if self._returned is None:
            return False
        returned, written = self._returned
        return returned() is sample and version(sample) == written

    def _order(self, index: int, taken: int) -> int:
        order = self.config.solver_order
        if self.config.lower_order_final:
            order = min(order, len(self.timesteps) - index)
        return min(order, taken + 1)

    def _row(self, index: int, order: int, corrected: int) -> int:
        """``corrected``: the order of the last step where the corrector is used, else 0."""
        block = corrected * len(ORDERS) + order - 1
        return index + block * len(self.timesteps)

    def _rows_of(self, columns: Columns, device: torch.device) -> CorrectedRows:
        correction = torch.stack([columns.pop(f"correction{i}") for i in range(4)], 1)
        kept = (self.sigmas,)
        return CorrectedRows.of(columns, device, kept=kept, correction=correction.tolist())

    def _predicted(self, *, in_x0: bool) -> Columns:
        """The a and b of x_0, or those of ε, at each of ``timesteps``."""
        prediction, sigmas = self.config.prediction_type, self.sigmas.cpu()[:-1]
        alpha, sigma = self._sigma_to_alpha_sigma_t(sigmas)
        if in_x0:
            return x_start_columns(prediction, alpha, sigma, sigmas)
        if prediction == "epsilon":
            return {"a": 0.0, "b": 1.0}
        if prediction == "v_prediction":
            return {"a": sigma, "b": alpha}
        return {"a": 1 / sigma, "b": -alpha / sigma}  # sample

    def _columns(self) -> Columns | str:
        """Of K rows a block: the orders of the prediction, for each order of the correction, none
        at first; in x_0, or in ε where that is what is predicted."""
        prediction, solver, thresholding, _, solver_order = _settings(self.config)
        known = PREDICTIONS if self.predict_x0 else PREDICTIONS[:3]
        if thresholding and self.predict_x0:
            return "dynamic thresholding"
        if prediction not in known:
            return f"prediction_type {prediction!r}"
        if solver not in ("bh1", "bh2"):
            return f"solver_type {solver!r}"
        if solver_order not in ORDERS:
            return f"solver_order {solver_order}"
        if self.solver_p:
            return "solver_p predicts"
        alpha, sigma = self._sigma_to_alpha_sigma_t(self.sigmas.cpu())
        steps = len(sigma) - 1
        shared = {"timesteps": self.timesteps.cpu(), **self._predicted(in_x0=self.predict_x0)}
        update = {order: _Update(alpha, sigma, order, self.predict_x0, solver) for order in ORDERS}
        nothing = torch.zeros(steps, 4, dtype=torch.float64)
        corrections = [nothing, *(update[order].correction() for order in ORDERS)]
        blocks = [
            shared | update[order].after(correction)
            for correction in corrections
            for order in ORDERS
        ]
        return in_blocks(blocks, steps)


class _Update:
    """UniP and UniC with B(h) from each of K + 1 levels, s, to the next, t.

    x_t = ratio·x_s + first·m_s + residual·Σ_j ρ_j·(m_j − m_s)/r_j over the levels j before s, and
    in UniC also over t itself, whose r is 1. diffusers' operations in their order, in float32: its
    differences of logarithms are part of its results. (K,) each, ``weights`` (K, order − 1) of the
    predictor and (K, order) of the corrector.
    """

    def __init__(self, alphas: Tensor, sigmas: Tensor, order: int, in_x0: bool, solver: str):
        lambdas = torch.log(alphas) - torch.log(sigmas)
        lambda_s = lambdas[:-1]
        h = lambdas[1:] - lambda_s
        hh = -h if in_x0 else h
        growth = torch.expm1(hh)
        scale = hh if solver == "bh1" else growth
        kept, other = (sigmas, alphas) if in_x0 else (alphas, sigmas)
        self.ratio = (kept[1:] / kept[:-1]).double()
        self.first = -(other[1:] * growth).double()
        self.residual = -(other[1:] * scale).double()
        # As in diffusers, the last levels precede the first.
        before = [(lambdas.roll(j)[:-1] - lambda_s) / h for j in range(1, order)]
        self.r = torch.stack([*before, torch.ones_like(h)], 1)
        powers = torch.stack([self.r**i for i in range(order)], 1)
        phi, factorial, sides = growth / hh - 1, 1, []
        for i in range(1, order + 1):
            sides.append(phi * factorial / scale)
            factorial *= i + 1
            phi = phi / hh - 1 / factorial
        side = torch.stack(sides, 1)
        half = torch.full((len(h), 1), 0.5)
        self.corrector = half if order == 1 else _solved(powers, side)
        self.predictor = half if order == 2 else _solved(powers[:, :-1, :-1], side[:, :-1])

    def correction(self) -> Tensor:
        """What UniC's x_t has more than UniP's: factors of m_t, m_s, and the two before, as the
        step from t finds them, (K, 4)."""
        newest = self.residual * self.corrector[:, -1]
        change = (self.corrector[:, :-1] - self.predictor).double() / self.r[:, :-1]
        older = self.residual[:, None] * change
        m_s = -newest - older.sum(1)
        factors = torch.cat([newest[:, None], m_s[:, None], older], 1)
        return torch.nn.functional.pad(factors, (0, 4 - factors.shape[1])).roll(1, 0)

    def after(self, correction: Tensor) -> Columns:
        """The columns of UniP from the corrected sample, x and ``correction`` times predictions."""
        factors = self.ratio[:, None] * correction
        differences = self.residual[:, None] * self.predictor.double() / self.r[:, :-1]
        # Where there are none, diffusers adds the residual times 0, which may be NaN.
        factors[:, 0] += self.first - differences.sum(1) + self.residual * 0
        factors[:, 1 : 1 + differences.shape[1]] += differences
        made = {name: factors[:, i] for i, name in enumerate(("c", "e0", "e1", "e2"))}
        kept = {f"correction{i}": correction[:, i] for i in range(4)}
        return {"d": self.ratio} | made | kept


def _solved(matrix: Tensor, side: Tensor) -> Tensor:
    """The solutions of linear systems (K, n, n) and (K, n); NaN where there is none."""
    solution, failed = torch.linalg.solve_ex(matrix, side)
    return torch.where(failed[:, None] == 0, solution, torch.nan)

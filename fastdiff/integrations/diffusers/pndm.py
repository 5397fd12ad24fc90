"""Pseudo numerical methods (Liu et al. 2022, arXiv:2202.09778) as diffusers' PNDMScheduler computes
them: Runge-Kutta's of the fourth order at first, unless it is skipped, then linear multistep."""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from diffusers.schedulers import scheduling_pndm as stock
from diffusers.schedulers.scheduling_utils import SchedulerOutput
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
    Rows,
    apply,
    is_readable,
    misfit,
)
from fastdiff.integrations.diffusers.multistep import (
    Columns,
    chosen_rows,
    in_blocks,
    kept_in_turns,
)

_PREDICTIONS = ("epsilon", "v_prediction")
_settings = attrgetter("prediction_type", "num_train_timesteps", "skip_prk_steps")
# Adams-Bashforth's weights of the outputs at this step and at those before, by their number.
_MULTISTEP = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
# The blocks of rows: a step by 1 to 4 outputs, the second try of the first step, Runge-Kutta's.
_AGAIN, _SLOPES = 4, 5
_BLOCKS = _SLOPES + len(_RUNGE_KUTTA)


@dataclass(frozen=True, slots=True)
class PNDMRows(TimestepRows):
    """``values``: of ``scheduler.timesteps``, which a block of rows follows."""

    values: list[int]


class PNDMScheduler(TimestepScheduler, stock.PNDMScheduler):
    """diffusers' PNDMScheduler with a fused step."""

    counter: int
    ets: list[Tensor]
    cur_sample: Tensor | None
    cur_model_output: Any

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
        assert isinstance(rows, PNDMRows)
        block = row // len(rows.values)
        memory = self._read(block)
        x_prev, _ = apply(rows, row, model_output, sample, memory=memory, return_x_start=False)
        if block < _AGAIN:
            self.ets = [*self.ets[-3:], model_output]
            if self.counter == 0:
                self.cur_sample = sample
        elif block == _AGAIN:
            self.cur_sample = None
        else:
            self._add_slope(block - _SLOPES, model_output, sample)
        self.counter += 1
        return SchedulerOutput(prev_sample=x_prev) if return_dict else (x_prev,)

    def _add_slope(self, stage: int, model_output: Tensor, sample: Tensor) -> None:
        if stage == 0:
            self.ets.append(model_output)
            self.cur_sample = sample
        if stage == len(_RUNGE_KUTTA) - 1:
            self.cur_model_output = 0
        else:
            self.cur_model_output = self.cur_model_output + _RUNGE_KUTTA[stage] * model_output

    def sampling_rows(self, device: torch.device, *, doubled_output: bool = False) -> Rows | str:
        """All of ``timesteps``, for a Sampler on ``device``, or why it cannot have them."""
        if doubled_output:
            return "its U-Net predicts a variance, which PNDM has no use for"
        if not self.config.skip_prk_steps:
            return (
                "Runge-Kutta's steps keep more than rows can (skip_prk_steps=True leaves them out)"
            )
        columns, steps = self._columns(), len(self.timesteps)
        if isinstance(columns, str):
            return columns
        blocks = [0, _AGAIN, *(min(i - 1, 3) for i in range(2, steps))][:steps]
        columns = chosen_rows(columns, [i + block * steps for i, block in enumerate(blocks)])
        columns |= {"k": 1 / columns["b"], "q": -columns["a"] / columns["b"]}  # the output
        if steps > 1:  # row 1 starts from row 0's x again, which is x less what row 0 added to it
            back = columns["e0"][1] / columns["d"][0]
            columns["d"][1], columns["e0"][1] = back, columns["e1"][1] - back * columns["o"][0]
            columns["e1"][1] = 0.0
        return self._rows_of(kept_in_turns(columns, steps, all_but=1), device)

    def _plan(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, **_: Any) -> Plan:
        if self.num_inference_steps is None:
            return NOT_SET
        reason = misfit(model_output, sample)
        if reason is not None:
            return reason
        key = (
            *self._watched(),
            id(self.final_alpha_cumprod),
            *_settings(self.config),
            self.num_inference_steps,
            sample.device,
        )
        rows = self._rows(key, lambda: self._make_rows(sample.device))
        if isinstance(rows, str):
            return rows
        place = rows.row(timestep)
        if isinstance(place, str):
            return place
        if self.config.skip_prk_steps or self.counter >= len(self.prk_timesteps):
            count = len(self.ets[-3:]) + 1
            again = self.counter == 1
            if (count == 1) != (self.counter == 0) or (again and count != 2):
                return f"call {self.counter} with {len(self.ets)} outputs before it"
            if not self.config.skip_prk_steps and count < 4:
                return f"Runge-Kutta's steps have left {len(self.ets)} outputs"
            block = _AGAIN if again else count - 1
        else:
            if rows.values[place] != rows.values[self.counter]:
                return f"timestep {rows.values[place]} is not that of call {self.counter}"
            place, block = self.counter, _SLOPES + self.counter % 4
        memory = self._read(block)
        if not all(is_readable(kept, sample) for kept in memory):
            return "what the calls before kept is missing, or unlike sample"
        row = block * len(rows.values) + place
        return rows.refusals[row] or (rows, row)

    def _read(self, block: int) -> list[Any]:
        """What a row of this block reads, as its memory has it."""
        if block < _AGAIN:
            return self.ets[::-1][:block]
        if block == _AGAIN:
            return [self.cur_sample, self.ets[-1]]
        return [self.cur_sample, self.cur_model_output][: (0, 1, 1, 2)[block - _SLOPES]]

    def _make_rows(self, device: torch.device) -> PNDMRows | str:
        columns = self._columns()
        return columns if isinstance(columns, str) else self._rows_of(columns, device)

    def _rows_of(self, columns: Columns, device: torch.device) -> PNDMRows:
        values = self.timesteps.tolist()
        return PNDMRows.of(
            columns,
            device,
            kept=(self.timesteps, self.alphas_cumprod, self.final_alpha_cumprod),
            row_of=first_rows(values),
            steps=len(values),
            address=self._address(),
            values=values,
        )

    def _columns(self) -> Columns | str:
        prediction, trained, _ = _settings(self.config)
        if prediction not in _PREDICTIONS:
            return f"prediction_type {prediction!r}"
        assert self.num_inference_steps is not None
        t = self.timesteps.cpu()
        stride = trained // self.num_inference_steps
        alpha = self._alphas_at(t.tolist())
        shared = {"timesteps": t, **x_start_columns(prediction, alpha)}
        of_x, of_output = self._transfer(t, t - stride)
        blocks = []
        for weights in _MULTISTEP.values():
            own, *before = (of_output * weight for weight in weights)
            blocks.append({"d": of_x, "o": own, **{f"e{i}": e for i, e in enumerate(before)}})
        of_x, of_output = self._transfer(t + stride, t)
        blocks.append({"e0": of_x, "o": of_output / 2, "e1": of_output / 2})
        # Runge-Kutta's trial points lie half a step on, half a step on, and a step on.
        call = torch.arange(len(t))
        starts = t[call // 4 * 4]
        ends = t - torch.where(call % 2 == 1, 0, stride // 2)
        of_x, of_output = self._transfer(starts, ends)
        blocks.append({"d": of_x, "o": of_output})
        blocks += [{"e0": of_x, "o": of_output}] * 2
        blocks.append({"e0": of_x, "o": of_output / 6, "e1": of_output})
        nothing = dict.fromkeys(("d", "o", "e0", "e1", "e2"), 0.0)
        return in_blocks([shared | nothing | block for block in blocks], len(t))

    def _transfer(self, t: Tensor, t_prev: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of x_t and of the output in x at t_prev, (K,): eq. 9 of the paper, in
        diffusers' operations and their order, in float32."""
        alpha = self._alphas_at(t.tolist())
        beta = 1 - alpha
        alpha_prev = torch.where(
            t_prev >= 0, self._alphas_at(t_prev.tolist()), self.final_alpha_cumprod.cpu()
        )
        share = alpha * (1 - alpha_prev) ** 0.5 + (alpha * beta * alpha_prev) ** 0.5
        of_x = ((alpha_prev / alpha) ** 0.5).double()
        of_eps = -(alpha_prev - alpha).double() / share
        if self.config.prediction_type == "epsilon":
            return of_x, of_eps
        return of_x + of_eps * beta**0.5, of_eps * alpha**0.5  # ε = √ᾱ·v + √(1 − ᾱ)·x_t

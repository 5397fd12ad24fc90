"""What a run measures: sums kept on the device between log lines, and the files they end up in."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.files import replace_text
from fastdiff.ranks import ALONE, Ranks
from fastdiff.training.boards import Board

QUARTILES = 4
OF_STEPS = ("grad_norm", "skipped_steps")  # the same on every rank; the others are of its samples


class IntervalMeter:
    """Loss terms and the gradient norm, summed on the device over the steps of one log interval.

    ``add`` costs no host-device synchronisation; ``summary`` costs one. Each loss term is kept
    overall and per quartile of the timestep, q0 holding the least noisy ones; of a continuous
    process, whose t is in [0, 1), ``num_timesteps`` is 1.

    The gradient has no quartiles: its norm for each would be four backward passes, and what is
    cheap, the gradient by the network's output, is the loss again.
    """

    def __init__(self, num_timesteps: int, device: torch.device) -> None:
        self.num_timesteps = num_timesteps
        self.device = device
        self.groups = torch.arange(-1, QUARTILES, device=device).unsqueeze(1)  # -1 stands for all
        self.reset()

    def reset(self) -> None:
        self.steps = 0
        self.samples = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, t: Tensor, weights: Tensor, losses: dict[str, Tensor], grad_norm: Tensor) -> None:
        """Count one step. ``t`` (N,), ``weights`` (N,), every loss term (N,)."""
        quartile = t * QUARTILES // self.num_timesteps
        # (5, N) in float64: of the squares much is subtracted again.
        member = ((quartile == self.groups) | (self.groups < 0)).double()
        weights = weights.double()
        self._accumulate("counts", member.sum(1))
        self._accumulate("weights", member @ weights)
        for name, values in losses.items():
            self._accumulate(f"loss.{name}", member @ (values.double() * weights))
        self._accumulate("squares", member @ (losses["loss"].double() ** 2 * weights))
        fine = torch.isfinite(grad_norm)
        self._accumulate("grad_norm", torch.where(fine, grad_norm.float(), 0.0))
        self._accumulate("skipped_steps", (~fine).float())
        self.steps += 1
        self.samples += len(t)

    def _accumulate(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def merged(self, ranks: Ranks) -> dict[str, Tensor]:
        """The state of a meter that had seen every rank's samples. Waits for the device."""
        if ranks.count == 1 or self.steps == 0:
            return self.state_dict()
        mine = {name: value.cpu() for name, value in self.state_dict().items()}
        every = ranks.gather(mine)
        total = {name: sum(part[name] for part in every) for name in mine}
        total["counts"][0] = mine["counts"][0]
        return total | {name: mine[name] for name in map("sums.{}".format, OF_STEPS)}

    def summary(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """Means over the interval, which then starts anew; a quartile without samples is left out.

        The overall means are of the importance-weighted losses, which is what the optimizer
        sees; a quartile's mean is divided by its own weights, so that it estimates the mean over
        that quartile's timesteps however they were drawn; "loss_q0_std" and so on are the standard
        deviations of its samples' losses, where it had two or more. Steps whose gradients
        overflowed, which changed nothing, are counted ("skipped_steps", where there were any) and
        have no norm.
        """
        if self.steps == 0:
            return {}
        if ranks.count > 1:
            self.load_state_dict(self.merged(ranks))
        names = list(self.sums)
        flat = torch.cat([self.sums[name].reshape(-1) for name in names]).tolist()
        rows = {}
        for name in names:
            rows[name], flat = flat[: self.sums[name].numel()], flat[self.sums[name].numel() :]
        weights, counts, squares = (rows.pop(name) for name in ("weights", "counts", "squares"))
        norm, skipped = (rows.pop(name)[0] for name in OF_STEPS)
        result = {"grad_norm": norm / max(1, self.steps - skipped)}
        if skipped:
            result["skipped_steps"] = skipped
        for key, row in rows.items():
            term = key.removeprefix("loss.")
            result[term] = row[0] / self.samples
            for q in range(QUARTILES):
                if weights[q + 1] > 0:
                    result[f"{term}_q{q}"] = row[q + 1] / weights[q + 1]
        for q in range(QUARTILES):
            if counts[q + 1] > 1:
                variance = squares[q + 1] / weights[q + 1] - result[f"loss_q{q}"] ** 2
                result[f"loss_q{q}_std"] = math.sqrt(max(variance, 0.0))
        self.reset()
        return result

    def state_dict(self) -> dict[str, Tensor]:
        counts = torch.tensor([self.steps, self.samples], dtype=torch.int64)
        return {"counts": counts, **{f"sums.{k}": v for k, v in self.sums.items()}}

    def load_state_dict(self, state: dict[str, Tensor], rank: int = 0) -> None:
        """Of several ranks the first takes over what all had counted, the others none of it."""
        self.steps, self.samples = state["counts"].tolist()
        self.sums = {
            key.removeprefix("sums."): value.to(self.device)
            for key, value in state.items()
            if key.startswith("sums.")
        }
        if rank:
            self.samples = 0
            for name in self.sums.keys() - set(OF_STEPS):
                self.sums[name] = torch.zeros_like(self.sums[name])


class MetricsWriter:
    """Writes metrics.jsonl, one JSON object per logged step, and to ``boards``.

    Opened at a step > 0, it first drops what an earlier process recorded past that step, so that
    a resumed run leaves neither a gap nor a duplicate.
    """

    def __init__(self, run_dir: Path, step: int, boards: Sequence[Board]) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.boards = boards
        truncate_metrics(self.path, step)
        self.file = open(self.path, "a", encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for board in self.boards:
            board.write(step, values)

    def write_images(self, step: int, name: str, images: Tensor) -> None:
        """``images``: uint8 (N, C, H, W)."""
        for board in self.boards:
            board.write_images(step, name, images)

    def sync(self) -> None:
        """Put the lines on disk: a checkpoint must never be newer than the metrics before it."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.file.close()
            for board in self.boards:
                board.close()
        except OSError:
            if error is None:  # a full disk is reported by whoever met it first
                raise


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a metrics.jsonl by their steps, of two for one step the later (a resumed run).

    None where there is no file. A last line that a killed process left unfinished is passed over.
    """
    if not path.exists():
        return []
    records = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records[record["step"]] = record
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise InputError(
                    f"{path}, line {number}: not a JSON object with a step: {line[:60]!r}"
                ) from None
    return [records[step] for step in sorted(records)]


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the records past ``step``."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))

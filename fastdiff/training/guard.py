"""Noticing a diverged run without waiting for the device at every step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.errors import TrainingError
from fastdiff.models.shards import local
from fastdiff.ranks import ALONE, Ranks


class FiniteGuard:
    """Remembers, on the device, the first step whose loss or gradient was not finite."""

    def __init__(self, device: torch.device) -> None:
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def record(self, step: int, *values: Tensor) -> None:
        """Look at scalar tensors of one step; waits for nothing."""
        fine = torch.stack([torch.isfinite(value) for value in values]).all()
        self.first_bad = torch.where(fine | (self.first_bad >= 0), self.first_bad, step)

    def check(self, advice: str, ranks: Ranks = ALONE) -> None:
        """Raise TrainingError naming that step, if there was one, and the rank that saw it first.
        Waits for the device, and for the other ranks, which check too."""
        found = ranks.numbers(int(self.first_bad)).flatten().tolist()
        steps = [step for step in found if step >= 0]
        if not steps:
            return
        if ranks.rank:
            raise SystemExit(2)  # rank 0 says it
        where = f" on rank {found.index(min(steps))}" if ranks.count > 1 else ""
        raise TrainingError(
            f"the loss or its gradient is not finite at step {min(steps)}{where}; {advice}"
        )


def check_weights(parameters: Sequence[Tensor], step: int, advice: str) -> None:
    """Raise TrainingError when an update made a weight infinite or NaN. Waits for the device."""
    finite = torch.stack([torch.isfinite(local(p.detach())).all() for p in parameters]).all()
    if not bool(finite):
        raise TrainingError(f"the weights are not finite after step {step}; {advice}")

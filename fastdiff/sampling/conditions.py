"""What changes a sampling step beside the network: x_0 transforms, a classifier, a known region."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.checks import check_float
from fastdiff.errors import InputError
from fastdiff.methods.protocol import noise_levels
from fastdiff.methods.table import Index, StepTable
from fastdiff.ops.q_sample.op import q_sample
from fastdiff.process.update import ClassifierGuidance, XStart


@dataclass(frozen=True)
class Known:
    """A region of x_0 that is given: after each row it is put there at that row's noise level.

    (Song et al. 2021, arXiv:2011.13456, appendix I.2; Lugmayr et al. 2022, arXiv:2201.09865, eq.
    8.) ``x_start`` (N, C, ...), ``mask`` boolean, true where x_start is known, of the same shape.
    ``signal``, ``noise``: (K,), the level that each row arrives at.
    """

    x_start: Tensor
    mask: Tensor
    signal: Tensor
    noise: Tensor

    @classmethod
    def of(
        cls,
        x_start: Tensor,
        mask: Tensor,
        shape: tuple[int, ...],
        device: torch.device,
        process: Any,
        table: StepTable,
    ) -> "Known":
        """For the rows of ``process``'s ``table``. InputError for what does not fit ``shape``."""
        check_float(x_start, "known")
        if not isinstance(mask, Tensor):
            raise InputError(f"known_mask is a {type(mask).__name__}; expected a tensor")
        for name, tensor in (("known", x_start), ("known_mask", mask)):
            try:
                torch.broadcast_to(tensor, shape)
            except RuntimeError:
                raise InputError(
                    f"{name} has shape {tuple(tensor.shape)}, which does not broadcast to the "
                    f"samples' {shape}"
                ) from None
        noise_levels(process)  # InputError for a table of its own, whose levels nobody knows
        assert table.levels is not None
        arrived = np.append(table.levels[1:], [[1.0, 0.0]], axis=0)
        levels = np.ascontiguousarray(arrived.T, dtype=np.float32)
        return cls(
            torch.broadcast_to(x_start.to(device, torch.float32), shape),
            torch.broadcast_to(mask.to(device) != 0, shape),
            *torch.from_numpy(levels).to(device),
        )

    def held(self, rows: int) -> "Known":
        """A copy with room for the levels of ``rows`` rows, for a captured step."""
        levels = torch.zeros(2, rows, device=self.x_start.device)
        return Known(self.x_start.clone(), self.mask.clone(), *levels)

    def fill(self, other: "Known") -> None:
        """Take over another's values, whose addresses change nothing."""
        rows = len(other.signal)
        self.x_start.copy_(other.x_start)
        self.mask.copy_(other.mask)
        self.signal[:rows].copy_(other.signal)
        self.noise[:rows].copy_(other.noise)

    def put(self, x: Tensor, i: Index, noise: dict[str, Any]) -> Tensor:
        """``noise``: q_sample's arguments."""
        row = torch.full((1,), i, device=x.device) if isinstance(i, int) else i
        noised, _ = q_sample(
            self.x_start, row.expand(len(x)), self.signal, self.noise, return_noise=False, **noise
        )
        return torch.where(self.mask, noised, x)


@dataclass
class Conditions:
    """All of them; by default none."""

    x_start: XStart = field(default_factory=XStart)
    classifier: ClassifierGuidance | None = None
    known: Known | None = None

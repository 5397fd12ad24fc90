"""What changes a sampling step beside the network: x_0 transforms, a classifier, a known region."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.checks import check_float, check_like
from fastdiff.errors import InputError
from fastdiff.methods.table import COLUMNS, Index, StepTable, noise_levels
from fastdiff.ops.posterior_step.reference import guide, log_variance
from fastdiff.ops.q_sample.op import q_sample
from fastdiff.process.reverse import CondFn, DenoisedFn

# --- The predicted x_0 ------------------------------------------------------------------------


@dataclass(frozen=True)
class XStart:
    """What happens to the predicted x_0 before clipping, or in its place.

    ``denoised_fn`` is applied to x_0. ``dynamic_threshold`` p clips each sample to its p-th
    quantile s of |x_0|, at least 1, and divides by s (Saharia et al. 2022, arXiv:2205.11487,
    section 2.3), in place of clipping to [−1, 1].
    """

    denoised_fn: DenoisedFn | None = None
    dynamic_threshold: float | None = None

    def __bool__(self) -> bool:
        return self.denoised_fn is not None or self.dynamic_threshold is not None

    def __call__(self, x_start: Tensor, clip: Tensor) -> Tensor:
        if self.denoised_fn is not None:
            given, x_start = x_start, self.denoised_fn(x_start)
            check_like(x_start, "what denoised_fn returned", given, "x")
        if self.dynamic_threshold is None:
            return x_start.clamp(-clip, clip)
        size = (-1,) + (1,) * (x_start.dim() - 1)
        s = quantile(x_start.flatten(1).abs(), self.dynamic_threshold).clamp(min=1).view(size)
        return x_start.clamp(-s, s) / s

    def output(
        self, x: Tensor, output: Tensor, table: StepTable, i: Index, scale: float | Tensor | None
    ) -> Tensor:
        """The output of a network that predicts the transformed x_0, for ``x_start_table``."""
        mean, rest = output[:, : x.shape[1]].float(), output[: len(x), x.shape[1] :]
        if scale is not None:
            mean = guide(mean, scale)
        x_start = table.at("a", i) * x + table.at("b", i) * mean
        x_start = self(x_start, table.at("clip", i))
        return torch.cat([x_start, rest.float()], dim=1) if table.doubled_output else x_start


def x_start_table(table: StepTable) -> StepTable:
    """The same steps for a network whose output is x_0 as it shall be."""
    packed = table.packed.clone()
    for name, value in (("a", 0.0), ("b", 1.0), ("clip", math.inf)):
        packed[:, COLUMNS.index(name)] = value
    return replace(table, packed=packed)


def quantile(values: Tensor, p: float) -> Tensor:
    """Each row's p-quantile, linearly interpolated: (N, D) → (N,). Waits for no device."""
    place = p * (values.shape[1] - 1)
    below = math.floor(place)
    ordered = values.sort(dim=1).values
    above = min(below + 1, values.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], place - below)


# --- A classifier -----------------------------------------------------------------------------


class ClassifierGuidance:
    """Guidance by a gradient g = ∇ log p(y | x_t) (Dhariwal & Nichol 2021, arXiv:2105.05233).

    DDPM moves the mean by variance·g (algorithm 1); the other methods ε by −noise·g (algorithm 2),
    hence x_0 by (noise²/signal)·g and x_{t−1} by the row's c times that.
    """

    def __init__(self, cond_fn: CondFn, process: Any, table: StepTable):
        self.cond_fn, self.table = cond_fn, table
        # In sampling order; a table may leave out the first of a process's steps.
        signal, noise = (level[: len(table)][::-1] for level in noise_levels(process))
        self.moves_mean = table.method == "ddpm"
        if self.moves_mean:
            self.gain = table.sigma.double().square().tolist()
            if process.var_type == "fixed_large":
                # The published variance of the last step, which draws no noise, is not zero.
                self.gain[-1] = float(getattr(process, "fixed_large_variance", [0.0])[0])
        else:
            if (signal == 0).any():
                raise InputError(
                    "cond_fn moves ε, which leaves x_0 undetermined at a step without signal "
                    "(zero terminal SNR); use method 'ddpm'"
                )
            self.gain = (noise**2 / signal).tolist()
        # Numbers, which no step has to wait for.
        self.c, self.log_min, self.log_max = (
            column.double().tolist() for column in (table.c, table.log_min, table.log_max)
        )

    def apply(
        self,
        x: Tensor,
        timesteps: Tensor,
        kwargs: Mapping[str, Any],
        output: Tensor,
        i: int,
        x_prev: Tensor,
        x_start: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(x_prev, pred_x_start) moved by the classifier's gradient at x_t."""
        gradient = self.cond_fn(x, timesteps, **kwargs)
        check_like(gradient, "what cond_fn returned", x, "x")
        gradient = gradient.float()
        if not self.moves_mean:
            x_start = x_start + self.gain[i] * gradient
            return x_prev + self.c[i] * self.gain[i] * gradient, x_start
        if not self.table.learned_variance:
            return x_prev + self.gain[i] * gradient, x_start
        v = output[: len(x), x.shape[1] :].float()
        variance = torch.exp(log_variance(v, self.log_min[i], self.log_max[i]))
        return x_prev + variance * gradient, x_start


# --- A known region ---------------------------------------------------------------------------


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
        rows: int,
    ) -> "Known":
        """For the last ``rows`` rows of ``process``. InputError for what does not fit ``shape``."""
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
        signal, noise = noise_levels(process)
        arrived = np.stack([np.append(1.0, signal[:-1]), np.append(0.0, noise[:-1])])
        levels = np.ascontiguousarray(arrived[:, :rows][:, ::-1], dtype=np.float32)
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

"""What follows the network at every step of every sampler: a row of a step table, applied.

``Sampler`` and the published loops share it. The predicted x_0 may be transformed on its way, and a
classifier may move what comes out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_like
from fastdiff.errors import InputError
from fastdiff.methods.table import COLUMNS, Index, StepTable
from fastdiff.ops.posterior_step import reference
from fastdiff.ops.posterior_step.op import DTYPES, check_tensors, posterior_step

DenoisedFn = Callable[[Tensor], Tensor]
CondFn = Callable[..., Tensor]


def at_row(values: Tensor, i: Index, x: Tensor) -> Tensor:
    """``values`` (K, ...) at row ``i``, or at each sample's where ``i`` is (N,), to broadcast over
    x. NaN for an index tensor that points outside: to look at its value would stall a device."""
    if isinstance(i, int):
        return values[i]
    inside = ((i >= 0) & (i < len(values))).view(-1, *(1,) * (values.dim() - 1))
    found = values.index_select(0, i.clamp(0, len(values) - 1))
    shape = (-1, *(1,) * (x.dim() - 1), *values.shape[1:])
    return torch.where(inside, found, torch.nan).view(shape)


def columns_at(table: StepTable, i: Index, x: Tensor) -> dict[str, Tensor]:
    """All columns at row ``i``, as :func:`at_row`."""
    return dict(zip(COLUMNS, at_row(table.packed, i, x).unbind(-1), strict=True))


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


@dataclass(frozen=True)
class Guidance:
    """unconditional + s·(conditional − unconditional) (Ho & Salimans 2022, arXiv:2207.12598), by
    ``scale`` s; None: there is none.

    ``unconditional`` (N, C or 2C, ...), a guide's answer (Karras et al. 2024, arXiv:2406.02507);
    without it the second half of the output's batch. ``rescale`` φ: the result is multiplied by
    φ·(standard deviation of the conditional / its own) + 1 − φ, each sample's (Lin et al. 2023,
    arXiv:2305.08891, eq. 15 and 16).
    """

    scale: float | Tensor | None = None
    unconditional: Tensor | None = None
    rescale: float = 0.0

    def check(self, x: Tensor, output: Tensor, table: StepTable) -> None:
        """InputError for an output that does not fit; posterior_step asks for itself."""
        given = (table.packed, table.doubled_output, self.scale, self.unconditional)
        check_tensors(x, output, *given)

    def arguments(self, output: Tensor, channels: int) -> dict[str, Any]:
        """posterior_step's."""
        if self.scale is None:
            return {}
        given: dict[str, Any] = {"guidance_scale": self.scale}
        if self.unconditional is not None:
            given["unconditional"] = self.unconditional
        if self.rescale:
            given["output_scale"] = self._factor(*self._means(output, channels))
        return given

    def mean(self, output: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
        """The guided (N, C, ...) of an output of so many channels for the mean."""
        conditional, guided = (mean.to(dtype) for mean in self._means(output, channels))
        if not self.rescale:
            return guided
        factor = self._factor(conditional, guided).to(dtype)
        return factor.view(-1, *[1] * (guided.dim() - 1)) * guided

    def _means(self, output: Tensor, channels: int) -> tuple[Tensor, Tensor]:
        """The conditional and the guided one."""
        output = output[:, :channels].to(torch.promote_types(output.dtype, torch.float32))
        if self.scale is None:
            return output, output
        if self.unconditional is None:
            output, unconditional = output.chunk(2)
        else:
            unconditional = self.unconditional[:, :channels].to(output.dtype)
        return output, reference.guide(output, unconditional, self.scale)

    def _factor(self, conditional: Tensor, guided: Tensor) -> Tensor:
        """(N,); 1 where the guided one is constant."""
        own, wanted = (mean.flatten(1).std(1) for mean in (guided, conditional))
        return torch.where(own > 0, self.rescale * wanted / own + 1 - self.rescale, 1.0)


class Update:
    """Rows of ``table`` applied to what the network answers, x_0 transformed by ``x_start``.

    ``mean_is_output``: rows read the output itself and not x_0 (DDPM by previous-x prediction), so
    that a transform changes the x_0 that is answered and nothing else.
    """

    def __init__(self, table: StepTable, x_start: XStart, mean_is_output: bool):
        self.table, self.x_start = table, x_start
        self.of_x_start = x_start_table(table) if x_start and not mean_is_output else None

    def __call__(
        self, x: Tensor, output: Tensor, i: Index, guidance: Guidance | None = None, **given: Any
    ) -> tuple[Tensor, Tensor]:
        """(x_prev, x_0); ``given`` are posterior_step's arguments."""
        guidance, channels = guidance or Guidance(), x.shape[1]
        x_start = self._transformed(x, output, i, guidance) if self.x_start else None
        if x_start is not None and self.of_x_start is not None:
            return apply_rows(x, x_start, self.of_x_start, i, **given)
        guided = guidance.arguments(output, channels)
        x_prev, own = apply_rows(x, output, self.table, i, **guided, **given)
        return x_prev, own if x_start is None else x_start[:, :channels]

    def _transformed(self, x: Tensor, output: Tensor, i: Index, guidance: Guidance) -> Tensor:
        """The output of a network that predicts the transformed x_0, for ``of_x_start``."""
        row, dtype = columns_at(self.table, i, x), self.table.packed.dtype
        mean = guidance.mean(output, x.shape[1], dtype)
        x_start = self.x_start(row["a"] * x.to(dtype) + row["b"] * mean, row["clip"])
        _, variance = split_output(output, self.table)
        if variance is None:
            return x_start
        return torch.cat([x_start, variance[: len(x)].to(dtype)], dim=1)


def mean_is_output(process: Any, table: StepTable) -> bool:
    """Whether the rows of a process are what its network answers: DDPM by previous-x prediction. Of
    a table without a process nobody knows."""
    return table.method == "ddpm" and getattr(process, "mean_type", None) == "previous_x"


def check_moves(process: Any, table: StepTable, moves: Mapping[str, Any]) -> None:
    """InputError for what ``moves`` x_0 (names of arguments; None: not given) where rows read
    the network's output beside it, which it would not move."""
    given = [name for name, move in moves.items() if move is not None]
    if given and not mean_is_output(process, table) and (table.o != 0).any():
        raise InputError(
            f"{given[0]} moves x_0, and rows of this table read the network's output beside it "
            f"(column o, as of clipped_eps=False); leave out {given[0]} or take other rows"
        )


def apply_rows(
    x: Tensor, output: Tensor, table: StepTable, i: Index, **given: Any
) -> tuple[Tensor, Tensor]:
    """(x_prev, x_0), both like x, of row ``i``, or of each sample's row where ``i`` is (N,)."""
    one_row = isinstance(i, int) or i.numel() == 1
    if one_row and x.dtype in DTYPES and x.dim() > 1:
        x_prev, x_start = posterior_step(x, output, table, i, **given)
        assert x_start is not None
        return x_prev, x_start
    # The kernel reads one row for the whole batch, in float32. Samples at timesteps of their own,
    # and float64, take the equation that it is tested against, with a row for each sample.
    dtype = table.packed.dtype
    mean, variance = split_output(output, table)
    noise = given["noise"]
    x_prev, x_start = reference.posterior_step(
        x.to(dtype),
        mean.to(dtype),
        columns_at(table, i, x),
        variance_output=variance if table.learned_variance else None,
        z=None if noise is None else noise.to(dtype),
    )
    return x_prev.to(x.dtype), x_start.to(x.dtype)


def split_output(output: Tensor, table: StepTable) -> tuple[Tensor, Tensor | None]:
    """The network's mean output, and what it says of the variance."""
    if not table.doubled_output:
        return output, None
    mean, variance = output.chunk(2, dim=1)
    return mean, variance


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


@dataclass(frozen=True)
class ClassifierGuidance:
    """Guidance by a gradient g = ∇ log p(y | x_t) (Dhariwal & Nichol 2021, arXiv:2105.05233).

    DDPM moves the mean by variance·g (algorithm 1); the other methods ε by −noise·g (algorithm 2),
    hence x_0 by (noise²/signal)·g and x_{t−1} by the row's c times that. ``gain``: (K,), those
    factors of g, of ``classifier_gain``.
    """

    cond_fn: CondFn
    table: StepTable
    gain: Tensor

    def apply(
        self,
        x: Tensor,
        timesteps: Tensor,
        kwargs: Mapping[str, Any],
        output: Tensor,
        i: Index,
        x_prev: Tensor,
        x_start: Tensor,
        memory: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        """(x_prev, x_0) of row ``i``, moved by the classifier's gradient at x_t, and so is what the
        row kept of x_0 in ``memory``."""
        gradient = self.cond_fn(x, timesteps, **kwargs)
        check_like(gradient, "what cond_fn returned", x, "x")
        gradient = gradient.to(self.table.packed.dtype)
        row = columns_at(self.table, i, x)
        moved = at_row(self.gain, i, x) * gradient
        if self.table.method != "ddpm":
            for slot, kept in enumerate(memory):
                kept.add_(torch.where(row["slot"] == slot, row["k"] * moved, 0.0))
            return (x_prev + row["c"] * moved).to(x.dtype), (x_start + moved).to(x.dtype)
        _, v = split_output(output, self.table)
        if v is not None:
            v = v[: len(x)].to(gradient.dtype)
            moved = torch.exp(reference.log_variance(v, row["log_min"], row["log_max"])) * gradient
        return (x_prev + moved).to(x.dtype), x_start


def classifier_gain(process: Any, table: StepTable) -> Tensor:
    """``ClassifierGuidance.gain``; infinite where x_t holds no signal that ε could tell of x_0."""
    if table.method == "ddpm":
        gain = table.sigma.square()
        if process.var_type == "fixed_large":
            # The published variance of the last step, which draws no noise, is not zero.
            gain[-1] = process.last_variance
        return gain
    assert table.levels is not None  # it is of the process
    signal, noise = torch.from_numpy(table.levels).unbind(1)
    return (noise**2 / signal).to(table.packed)

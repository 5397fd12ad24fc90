"""Which timesteps a training step looks at: uniform, or importance-sampled by the loss.

Everything stays on the device: neither drawing nor updating waits for it.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastdiff.checks import is_finite
from fastdiff.errors import InputError

SAMPLER_NAMES = ("uniform", "loss-second-moment")


class HasTimesteps(Protocol):
    """A process of steps 0 … num_timesteps − 1; or one with ``continuous = True``, whose t is a
    level's quantile in [0, 1) (fastdiff.EDM)."""

    num_timesteps: int


class UniformSampler:
    """Every timestep, or quantile of a continuous process's levels, equally often; weight 1."""

    def __init__(self, diffusion: HasTimesteps | int):
        self.continuous = is_continuous(diffusion)
        self.num_timesteps = _num_timesteps(diffusion)

    def sample(
        self,
        n: int,
        device: torch.device | str,
        generator: torch.Generator | None = None,
        *,
        u: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``n`` timesteps (n,), int64 or, of a continuous process, float32 in [0, 1], and the
        weights of their losses (n,) float32: all 1. ``u``: uniform numbers in [0, 1), float64 (n,)
        on the device, to draw them by."""
        u = _uniform(n, device, generator) if u is None else u
        t = u.float() if self.continuous else (u * self.num_timesteps).long()
        return t, torch.ones(n, dtype=torch.float32, device=device)

    def update_with_losses(self, t: Tensor, losses: Tensor) -> None:
        """Nothing to learn: here so that every sampler is trained with alike."""

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: there is nothing to restore."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Accept only what :meth:`state_dict` gave (InputError otherwise)."""
        if state:
            raise InputError(f"the uniform sampler has no state, got {', '.join(state)}")


class LossSecondMomentSampler:
    """p_t ∝ √E[L_t²] over each timestep's last losses (Nichol & Dhariwal 2021 eq. 18).

    Uniform until every timestep has ``history_per_term`` losses; then mixed with ``uniform_prob``
    of the uniform distribution. The weights 1 / (T·p_t) keep the expected loss unchanged. The state
    moves to the device it is used on.
    """

    def __init__(
        self,
        diffusion: HasTimesteps | int,
        history_per_term: int = 10,
        uniform_prob: float = 0.001,
    ):
        if is_continuous(diffusion):
            raise InputError(
                "the loss-second-moment sampler keeps a history for each timestep, and a "
                f"{type(diffusion).__name__} has none in training: use 'uniform'"
            )
        self.num_timesteps = _num_timesteps(diffusion)
        if not isinstance(history_per_term, int) or history_per_term < 1:
            raise InputError(
                f"history_per_term must be at least 1 and an integer, got {history_per_term!r}"
            )
        if not (is_finite(uniform_prob) and 0 <= uniform_prob <= 1):
            raise InputError(f"uniform_prob must lie in [0, 1], got {uniform_prob}")
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        # A ring per timestep. One row more than there are timesteps: losses to be dropped go there.
        shape = (self.num_timesteps + 1, history_per_term)
        self._history = torch.zeros(shape, dtype=torch.float64)
        self._counts = torch.zeros(self.num_timesteps + 1, dtype=torch.int64)

    def weights(self) -> Tensor:
        """The probability of every timestep, float64 (T,), on the device of the state."""
        uniform = 1.0 / self.num_timesteps
        p = self._history[:-1].square().mean(dim=1).sqrt()
        p = p / p.sum() * (1 - self.uniform_prob) + self.uniform_prob * uniform
        # All-zero losses divide 0 by 0: no timestep is then more important than another.
        known = (self._counts[:-1] >= self.history_per_term).all() & p.isfinite().all()
        return torch.where(known, p, uniform)

    def sample(
        self,
        n: int,
        device: torch.device | str,
        generator: torch.Generator | None = None,
        *,
        u: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``n`` timesteps (n,) int64 and the weights of their losses (n,) float32, 1 / (T·p).
        ``u`` as :meth:`UniformSampler.sample`'s."""
        self._move(torch.device(device))
        p = self.weights()
        # Inverse CDF: torch.multinomial checks its input on the device and would abort it.
        cdf = p.cumsum(0)
        u = _uniform(n, device, generator) if u is None else u
        t = torch.searchsorted(cdf, u * cdf[-1], right=True).clamp(max=self.num_timesteps - 1)
        return t, (1.0 / (self.num_timesteps * p[t])).float()

    def update_with_losses(self, t: Tensor, losses: Tensor) -> None:
        """Record unweighted losses (n,) of the timesteps ``t`` (n,) they were measured at.

        In the order given: where a timestep occurs more often than the history is long, the last
        ones stay. Losses that are not finite are left out. InputError for shapes that
        differ and for timesteps that are no integers.
        """
        if t.is_floating_point() or t.dtype == torch.bool:
            raise InputError(f"update_with_losses needs integer timesteps, got {t.dtype}")
        if t.dim() != 1 or t.shape != losses.shape:
            raise InputError(
                "update_with_losses needs t and losses of one shape (n,), "
                f"got {tuple(t.shape)} and {tuple(losses.shape)}"
            )
        self._move(losses.device)
        losses = losses.detach().double()
        spare = self.num_timesteps
        usable = losses.isfinite() & (t >= 0) & (t < spare)
        rows, order = torch.where(usable, t, spare).sort(stable=True)
        kept, slots = self._slots(rows)
        self._history[kept, slots] = losses[order]
        self._counts.scatter_add_(0, rows, torch.ones_like(rows))

    def _slots(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The history's row and slot for each loss, given its timestep in ascending ``rows``."""
        first = torch.searchsorted(rows, rows, right=False)
        after = torch.searchsorted(rows, rows, right=True)
        place = torch.arange(len(rows), device=rows.device) - first  # among equal timesteps
        slots = (self._counts[rows] + place) % self.history_per_term
        # Of more than a history's worth only the last go in: two writes to a slot have no order.
        last = place >= (after - first) - self.history_per_term
        return torch.where(last, rows, self.num_timesteps), slots

    def state_dict(self) -> dict[str, Tensor]:
        """{"history" float64 (T, H), "counts" int64 (T,)}: copies, on the device of the state."""
        return {"history": self._history[:-1].clone(), "counts": self._counts[:-1].clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave. InputError where the shapes are others."""
        mine = self.state_dict()
        for name, value in mine.items():
            if name not in state or state[name].shape != value.shape:
                came = tuple(state[name].shape) if name in state else "nothing"
                raise InputError(
                    f"the importance sampler's {name!r} should have shape {tuple(value.shape)}, "
                    f"got {came}: was it saved for another number of timesteps?"
                )
        self._history[:-1].copy_(state["history"])
        self._counts[:-1].copy_(state["counts"])

    def _move(self, device: torch.device) -> None:
        if self._history.device != device:
            self._history = self._history.to(device)
            self._counts = self._counts.to(device)


TimestepSampler = UniformSampler | LossSecondMomentSampler


def create_timestep_sampler(name: str, diffusion: HasTimesteps | int) -> TimestepSampler:
    """The sampler called ``name``: "uniform" or "loss-second-moment" (InputError otherwise)."""
    if name == "uniform":
        return UniformSampler(diffusion)
    if name == "loss-second-moment":
        return LossSecondMomentSampler(diffusion)
    raise InputError(f"unknown timestep sampler {name!r}: choose {' or '.join(SAMPLER_NAMES)}")


def is_continuous(diffusion: HasTimesteps | int) -> bool:
    """Whether a process's noise levels are drawn from a density in training, not from steps."""
    return bool(getattr(diffusion, "continuous", False))


def _uniform(n: int, device: torch.device | str, generator: torch.Generator | None) -> Tensor:
    return torch.rand(n, dtype=torch.float64, device=device, generator=generator)


def _num_timesteps(diffusion: HasTimesteps | int) -> int:
    count = getattr(diffusion, "num_timesteps", diffusion)
    if not isinstance(count, int | np.integer):
        raise InputError(f"expected a diffusion process or a number of timesteps, got {count!r}")
    if count < 1:
        raise InputError(f"the number of timesteps must be at least 1, got {count}")
    return int(count)

"""One-step methods: the way of a sample as legs, and the rows that each leg takes.

In y = x / signal every process is q(y | x_0) = N(x_0, σ²·I) with σ = noise / signal, and all
deterministic steps solve dy/dσ = (y − x_0) / σ (Karras et al. 2022, arXiv:2206.00364, eq. 1 with
s = 1). What they differ in is where on the way they ask the network for x_0, and how they weigh the
answers:

    x_to = d·x_at + c·(w_0·x_0 + w_1·x_0' + …),     w_0 + w_1 + … = 1

with the c and d of DDIM's exact step for a constant x_0.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest

from fastdiff.checks import is_finite
from fastdiff.errors import InputError
from fastdiff.methods.levels import Level, Source
from fastdiff.methods.rows import SLOTS, Row, ddim_step


@dataclass(frozen=True)
class Leg:
    """From a sample at ``at`` without noise to the level ``to``, and up to ``next`` by fresh noise.

    ``next`` is where the next leg begins; where nothing is added it is ``to``. ``s_noise``
    multiplies what is added.
    """

    at: Level
    to: Level
    next: Level
    s_noise: float = 1.0

    @property
    def is_first_order(self) -> bool:
        """To the data, and from or to a level without signal, there is nothing but Euler's step:
        dy/dσ is undefined at the one, σ infinite at the other."""
        return self.to.noise == 0 or self.at.signal == 0 or self.to.signal == 0

    def rows(
        self, points: Sequence[Level] = (), weights: Sequence[Sequence[float]] = ()
    ) -> list[Row]:
        """A row for the network at ``at`` and at each of ``points`` on the way, in that order.

        ``weights``: the w of each point, and then of ``to``; one number less than there are
        answers, x_0's own is what is left of 1. Nothing given: Euler's step, which is DDIM's.

        A row has x at its own point, not at ``at``; but that is linear in x_at and the answers, so
        what is kept is the answers alone: the i-th in slot i.
        """
        rows: list[Row] = []
        d_before, answers_before = 1.0, [0.0]
        stages = zip((self.at, *points), (*points, self.to), ((), *weights), strict=True)
        for i, (point, to, later) in enumerate(stages):
            c, d = ddim_step(self.at, to)
            answers = [c * (1 - sum(later)), *(c * w for w in later)]
            d_step = d / d_before
            given = zip_longest(answers, answers_before, fillvalue=0.0)
            *memory, own = (now - d_step * before for now, before in given)
            e0, e1, e2 = (*memory, *[0.0] * (SLOTS - len(memory)))
            row = Row(point, c=own, d=d_step, e=(e0, e1, e2), begins=i == 0)
            rows.append(replace(row, slot=i, k=1.0) if i < len(points) else row)
            d_before, answers_before = d, [*answers, 0.0]
        return [*rows[:-1], self._up(rows[-1])]

    def _up(self, row: Row) -> Row:
        """``row``, which makes x at ``to``, with what takes that to ``next``: y is left as it is,
        and noise of variance σ_next² − σ_to² is added."""
        if self.next == self.to:
            return row
        ratio = self.next.signal / self.to.signal
        kept = ratio * self.to.noise
        added = math.sqrt((self.next.noise - kept) * (self.next.noise + kept))
        e0, e1, e2 = (ratio * factor for factor in row.e)
        return replace(
            row, c=ratio * row.c, d=ratio * row.d, e=(e0, e1, e2), sigma=self.s_noise * added
        )


def at_sigmas(source: Source, sigmas: Sequence[float]) -> list[Level]:
    """The levels of these σ, in this order: the process's own steps where they are such up to
    rounding."""
    own = {level.sigma: level for level in source.steps}
    rising = sorted(own)
    found: dict[float, Level] = {}
    for sigma in sigmas:
        above = bisect_left(rising, sigma)
        for near in rising[max(above - 1, 0) : above + 1]:
            if math.isclose(near, sigma, rel_tol=1e-12):
                found[sigma] = own[near]
    others = [sigma for sigma in sigmas if sigma not in found]
    between = source.between([-math.log(sigma) for sigma in others])
    found |= zip(others, between, strict=True)
    return [found[sigma] for sigma in sigmas]


def churned(
    source: Source, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> list[Leg]:
    """A leg a step, each but the first from σ̂ = σ·(1 + γ), to which noise takes its x
    (arXiv:2206.00364, algorithm 2).

    γ = min(s_churn / K, √2 − 1) where s_tmin ≤ σ ≤ s_tmax, else 0. The row before a leg adds its
    noise: the first leg has none, and is not churned; nor does σ̂ exceed the noisiest step that has
    signal.
    """
    for name, value in {"s_churn": s_churn, "s_noise": s_noise, "s_tmin": s_tmin}.items():
        check_not_negative(name, value)
    if s_tmax != math.inf:
        check_not_negative("s_tmax", s_tmax)
    sigmas = [level.sigma for level in source.steps]
    first, *others = sigmas
    gamma = min(s_churn / len(sigmas), math.sqrt(2) - 1)
    most = max(filter(math.isfinite, sigmas), default=first)
    lifted = [
        min(sigma * (1 + gamma), most) if s_tmin <= sigma <= s_tmax else sigma for sigma in others
    ]
    *begins, data = (*at_sigmas(source, [first, *lifted]), source.path[-1])
    return [
        Leg(at, to, after, s_noise)
        for at, to, after in zip(begins, source.path[1:], (*begins[1:], data), strict=True)
    ]


def ancestral(path: Sequence[Level], eta: float, s_noise: float = 1.0) -> list[Leg]:
    """A leg from each level of ``path`` to the next, of which ``eta`` is the share of noise.

    σ_up = eta·σ_to·√(1 − σ_to²/σ_at²) is added, and the way before leads to σ_down, σ_down² =
    σ_to² − σ_up². At ``eta`` 1 Euler's steps are those of DDPM's posterior, at 0 DDIM's.
    """
    if not (is_finite(eta) and 0 <= eta <= 1):
        raise InputError(f"eta is {eta!r}; expected 0 (deterministic) … 1 (the DDPM variance)")
    check_not_negative("s_noise", s_noise)
    legs = []
    for at, to in pairwise(path):
        share = eta * to.sigma / at.sigma if eta else 0.0  # 0·∞ where there is no signal
        left = math.hypot(math.sqrt((1 - eta) * (1 + eta)), share)
        legs.append(Leg(at, replace(to, noise=to.noise * left), to, s_noise))
    return legs


def check_not_negative(name: str, value: float) -> None:
    """InputError for anything else than a number of at least 0."""
    if not (is_finite(value) and value >= 0):
        raise InputError(f"{name} is {value!r}; expected a finite number of at least 0")

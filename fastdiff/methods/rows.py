"""Rows of a step table one by one, for methods whose rows differ in more than their noise levels.

A row reads x at one noise level and makes the x of the next row's; what it keeps for rows after it
goes into one of three slots of memory. The equation stands in fastdiff/methods/table.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fastdiff.methods.levels import Level

SLOTS = 3  # of memory: what the highest orders read beside x and x_0


@dataclass(frozen=True)
class Row:
    """One network call and the update after it.

    at: the noise level of the x that it reads; it makes the x that the next row reads, or the data.
    c, d, o, sigma: factors of x_0, x, the network's output and fresh noise.
    e: factors of what the slots of memory hold.
    slot, k, q: memory slot ← k·x_0 + q·x, after the slots are read; None keeps nothing.
    begins: x is a sample of the process at its level: no trial point between two of them.
    """

    at: Level
    c: float = 0.0
    d: float = 0.0
    o: float = 0.0
    sigma: float = 0.0
    e: tuple[float, float, float] = (0.0, 0.0, 0.0)
    slot: int | None = None
    k: float = 0.0
    q: float = 0.0
    begins: bool = True

    def columns(self) -> dict[str, float]:
        """By their names in COLUMNS (table.py), but for the clip."""
        at = self.at
        own = {name: getattr(self, name) for name in ("c", "d", "o", "sigma", "k", "q")}
        memory = {f"e{slot}": factor for slot, factor in enumerate(self.e)}
        kept = {"slot": -1.0 if self.slot is None else float(self.slot)}
        network = {"a": at.a, "b": at.b, "timesteps": at.timestep, "input_scale": at.input_scale}
        return own | memory | kept | network


@dataclass
class History:
    """Which slot holds the x_0 (or ε) of how many rows ago, for methods that keep the last few.

    ``length``: how many are kept. ``recent``: the rows they are of, the newest first.
    """

    length: int
    recent: list[int] = field(default_factory=list)

    def slot(self, row: int) -> int:
        return row % self.length

    def factors(self, weights: Sequence[float]) -> tuple[float, float, float]:
        """``e`` of a Row from the weights of the newest kept value, the one before it, …"""
        e = [0.0] * SLOTS
        for row, weight in zip(self.recent, weights, strict=False):
            e[self.slot(row)] = weight
        return e[0], e[1], e[2]

    def keep(self, row: int) -> int | None:
        """The slot that ``row`` writes, after it has read: that of the oldest. None of length 0."""
        self.recent = [row, *self.recent][: self.length]
        return self.slot(row) if self.length else None


def ddim_step(at: Level, to: Level) -> tuple[float, float]:
    """(c, d) of the exact step with x_0 constant: x_to = c·x_0 + d·x_at (Song et al. 2020, eq. 12
    with σ = 0; Lu et al. 2022, arXiv:2211.01095, eq. 9 to first order)."""
    d = to.noise / at.noise
    return to.signal - at.signal * d, d


def log_snr_step(at: Level, to: Level) -> float:
    """h = λ_to − λ_at with λ = log(signal / noise): ∞ to the data, and from a level without
    signal."""
    return to.log_snr - at.log_snr


def phi(order: int, h: float) -> float:
    """φ_k(−h) of exponential integrators: φ_0 = e^−h, φ_{k+1} = (1/k! − φ_k)/h, by its series
    where that cancels; its limits at h = ∞ (Hochbruck & Ostermann 2010, eq. 2.9–2.10)."""
    if math.isinf(h):
        return 0.0
    if abs(h) < 0.5:
        return math.fsum((-h) ** j / math.factorial(j + order) for j in range(20))
    value = math.exp(-h)
    for k in range(order):
        value = (1 / math.factorial(k) - value) / h
    return value


def solve(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """The solution of a small linear system."""
    return np.linalg.solve(np.asarray(matrix), np.asarray(right)).tolist()

"""DEIS (Zhang & Chen 2022, arXiv:2204.13902): Adams–Bashforth on the semilinear ODE of ε."""

import math
from itertools import pairwise

import numpy as np

from fastdiff.errors import InputError
from fastdiff.methods.levels import Level, Source
from fastdiff.methods.multistep import checked_order, eps_row, weights
from fastdiff.methods.registry import method
from fastdiff.methods.rows import History, Row, log_snr_step, phi

VARIABLES = ("logrho", "t")
QUADRATURE = np.polynomial.legendre.leggauss(16)  # exact to rounding for smooth t(λ)


@method("deis")
def deis(source: Source, *, order: int | None = None, variable: str = "logrho") -> list[Row]:
    """x/signal moves by ∫ ε dρ, ρ = noise/signal, with ε a polynomial through its last values.

    The first rows are of the orders that there are ε for, the last is DDIM's, as log ρ = −∞ there;
    of fewer than 15 rows the last but one is of second order at most, as in diffusers.

    Args:
        source: the process's levels and what the network predicts.
        order: 1 … 4, how many ε; the paper's AB0 … AB3. 3 where None.
        variable: what the polynomial is in: "logrho" = −λ, as in diffusers, or "t", the network's
            timestep (tAB), for a process with ``at_log_snr``. In ρ itself it is the method "lms".

    Raises:
        InputError: another ``order``, one of more than the steps, or another ``variable``.
    """
    if variable not in VARIABLES:
        raise InputError(f"variable is {variable!r}; expected {' or '.join(VARIABLES)}")
    order = checked_order(order, source, usual=3, highest=4)
    history = History(order - 1)
    integral = _in_log_rho if variable == "logrho" else _in_t
    rows, path = [], source.path
    for i, (at, to) in enumerate(pairwise(path)):
        left = source.left(i)
        most = left if left == 1 or len(source.steps) < 15 else order
        before = [path[row] for row in history.recent[: most - 1]]
        rows.append(eps_row(i, at, to, integral(source, at, to, before) if before else [], history))
    return rows


def _in_log_rho(source: Source, at: Level, to: Level, before: list[Level]) -> list[float]:
    """The weights of ε at ``before``, less ε, in ∫ ε dρ from ``at`` to ``to``."""
    h = log_snr_step(at, to)
    nodes = [log_snr_step(at, level) / h for level in before]
    # ∫ τ^k dρ with λ = λ_at + τ·h, so that dρ = −h·ρ_to·e^(h(1 − τ)) dτ
    powers = range(1, len(nodes) + 1)
    moments = [-h * to.sigma * math.factorial(k) * phi(k + 1, -h) for k in powers]
    return weights(nodes, moments)


def _in_t(source: Source, at: Level, to: Level, before: list[Level]) -> list[float]:
    """The same, with the moments by quadrature over λ."""
    h, step = log_snr_step(at, to), to.timestep - at.timestep
    nodes = [(level.timestep - at.timestep) / step for level in before]
    points, shares = QUADRATURE
    tau = (1 - points) / 2  # falling, as between answers
    there = source.between((at.log_snr + tau * h).tolist())
    s = np.array([(level.timestep - at.timestep) / step for level in there])
    d_rho = -h * to.sigma * np.exp(h * (1 - tau)) * shares / 2
    return weights(nodes, [float(np.sum(d_rho * s**k)) for k in range(1, len(nodes) + 1)])

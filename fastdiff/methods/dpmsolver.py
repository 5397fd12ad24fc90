"""DPM-Solver++ of second and third order, 2M and 3M, and its SDE forms (Lu et al. 2022,
arXiv:2211.01095; the SDE of third order and eta as k-diffusion has them)."""

import math
from itertools import pairwise

from fastdiff.checks import is_finite
from fastdiff.errors import InputError
from fastdiff.methods.levels import Level, Source
from fastdiff.methods.registry import method
from fastdiff.methods.rows import History, Row, log_snr_step, phi

SOLVER_TYPES = ("midpoint", "heun")


@method("dpmsolver++")
def dpmsolver(source: Source, *, solver_type: str = "midpoint") -> list[Row]:
    """DPM-Solver++(2M): DDIM's step with an extrapolated x_0. Options as of ``_rows``."""
    return _rows(source, 2, eta=0.0, solver_type=solver_type, lower_order_final=True)


@method("dpmsolver++3m")
def dpmsolver_3m(
    source: Source, *, solver_type: str = "midpoint", lower_order_final: bool = True
) -> list[Row]:
    """DPM-Solver++(3M). Options as of ``_rows``."""
    return _rows(source, 3, eta=0.0, solver_type=solver_type, lower_order_final=lower_order_final)


@method("sde-dpmsolver++")
def sde_dpmsolver(source: Source, *, eta: float = 1.0, solver_type: str = "midpoint") -> list[Row]:
    """SDE-DPM-Solver++(2M): at eta 1 the posterior's step with an extrapolated x_0, to first order
    DDPM with the small variance. Options as of ``_rows``."""
    return _rows(source, 2, eta=eta, solver_type=solver_type, lower_order_final=True)


@method("sde-dpmsolver++3m")
def sde_dpmsolver_3m(
    source: Source,
    *,
    eta: float = 1.0,
    solver_type: str = "heun",
    lower_order_final: bool = False,
) -> list[Row]:
    """SDE-DPM-Solver++(3M), k-diffusion's dpmpp_3m_sde. Options as of ``_rows``."""
    return _rows(source, 3, eta=eta, solver_type=solver_type, lower_order_final=lower_order_final)


def _rows(
    source: Source, order: int, *, eta: float, solver_type: str, lower_order_final: bool
) -> list[Row]:
    """x' = (noise'/noise)·e^(−ηh)·x + signal'·(1 − e^(−(1 + η)h))·(x_0 and differences of those
    kept) + noise'·√(1 − e^(−2ηh))·z.

    The first row is of first order, so is the last (it arrives at noise 0, λ = ∞) and the one after
    a row without signal (λ = −∞), the next of second.

    Args:
        source: the process's levels and what the network predicts.
        order: 2 or 3.
        eta: the share of noise, 0 the ODE's, 1 the SDE's.
        solver_type: what rows of second order multiply the slope of x_0 by: "midpoint" as DDIM's
            step multiplies x_0 by its value half way, "heun" by the exact integral.
        lower_order_final: of fewer than 15 rows the last but one is of second order, as in
            diffusers.

    Raises:
        InputError: a negative ``eta``, another ``solver_type``.
    """
    if not (is_finite(eta) and eta >= 0):
        raise InputError(f"eta is {eta!r}; expected ≥ 0 (0 the ODE, 1 the SDE)")
    if solver_type not in SOLVER_TYPES:
        raise InputError(f"solver_type is {solver_type!r}; expected {' or '.join(SOLVER_TYPES)}")
    history = History(order - 1)
    rows, path = [], source.path
    for i, (at, to) in enumerate(pairwise(path)):
        h, left = log_snr_step(at, to), source.left(i)
        lost = eta * h if eta else 0.0  # 0·∞ where h is infinite
        lowered = left == 1 or (lower_order_final and len(source.steps) < 15)
        before = [path[row] for row in history.recent[: left - 1 if lowered else order - 1]]
        change = _differences(at, to, before, h + lost, solver_type)
        d = to.noise / at.noise * math.exp(-lost)
        rows.append(
            Row(
                at,
                c=to.signal - at.signal * d - to.signal * sum(change),
                d=d,
                sigma=to.noise * math.sqrt(-math.expm1(-2 * lost)),
                e=history.factors([to.signal * weight for weight in change]),
                slot=history.keep(i) if at.signal else None,
                k=1.0,
            )
        )
    return rows


def _differences(
    at: Level, to: Level, before: list[Level], h: float, solver_type: str
) -> list[float]:
    """w of Σ_j w_j·(x_0 at before_j − x_0), what a row of second or third order adds.

    The third order is as published, where x_0's second difference counts half of what a Taylor
    polynomial gives it: it converges with order 2, at a smaller error than 2M. UniPC without its
    corrector is the step of order 3. ``h``: with eta's share, (1 + η)·h.
    """
    if not before:
        return []
    step = log_snr_step(at, to)
    steps = [log_snr_step(*levels) / step for levels in pairwise([*before[::-1], at])][::-1]
    first = h * phi(2, h)
    if len(steps) == 1:
        if solver_type == "midpoint":
            first = -math.expm1(-h) / 2
        return [-first / steps[0]]
    newer, older = steps  # r_0 and r_1
    bend = (first * newer + h * phi(3, h)) / (newer + older)
    return [-(first + bend) / newer - bend / older, bend / older]

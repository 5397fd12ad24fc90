"""k-diffusion's samplers by DPM-Solver (Lu et al. 2022, arXiv:2206.00927), which choose their σ
themselves: ``sample_dpm_fast`` for a number of calls, ``sample_dpm_adaptive`` for a tolerance.

In λ = −log σ, from x at σ over h to x' at σ', with ε and the ε_i found r_i·h on the way, a step of
each order is (section 3.2, φ_k being those of exponential integrators)

    1: x' = x − σ'·(e^h − 1)·ε
    2: x' = x − σ'·(e^h − 1)·(ε + (ε_1 − ε) / 2r_1)
    3: x' = x − σ'·(e^h − 1)·(ε + (ε_2 − ε) / r_2·φ_2(h) / φ_1(h))

and so is the way to each point: to the first by order 1; to the second as by 3 over r_2·h, where
the first lies r_1 / r_2 on the way.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.checks import check_positive, is_finite
from fastdiff.errors import InputError
from fastdiff.integrations.k_diffusion.walk import (
    Callback,
    Model,
    NoiseSampler,
    Walk,
    check_x,
    level,
    progress,
)
from fastdiff.methods.legs import Leg, check_not_negative
from fastdiff.methods.rows import Row, log_snr_step, phi

POINTS: dict[int, tuple[float, ...]] = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}  # r_i of each order
SHORTEST = 1e-6  # step in λ: shorter ones float32 does not tell apart


@torch.no_grad()
def sample_dpm_fast(
    model: Model, x: Tensor, sigma_min: float | Tensor, sigma_max: float | Tensor, n: int,
    extra_args: dict[str, Any] | None = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 0.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver-fast: ``n`` calls of the model in steps of one length in λ, of third order as far
    as there are calls (arXiv:2206.00927, section 3.4). A ``sigma_min`` above ``sigma_max``, with
    ``eta`` 0, leads from data to noise."""
    begin, end = _ends(x, sigma_min, sigma_max, eta, s_noise)
    orders = _orders(n)
    log_snr = np.linspace(begin, end, len(orders) + 1).tolist()
    rows: list[Row] = []
    for order, (at, to) in zip(orders, pairwise(log_snr), strict=True):
        rows += _rows(_leg(at, to, end, eta, s_noise), POINTS[order])
    walk = Walk(model, x, rows, extra_args)
    t = torch.tensor(log_snr, device=x.device)
    sigmas = t.neg().exp()
    begun = accumulate(row.begins for row in rows)
    with progress(n, disable) as advance:
        for row, step in enumerate(count - 1 for count in begun):
            denoised = walk.denoised(x, row)
            advance()
            if callback is not None and rows[row].begins:
                seen = {"sigma": sigmas[step], "sigma_hat": sigmas[step], "x": x, "i": step}
                callback(seen | {"t": t[step], "t_up": t[step], "denoised": denoised})
            noise = None
            if walk.table.noisy_rows[row]:
                noise = _drawn(x, noise_sampler, sigmas[step], sigmas[step + 1])
            x = walk.step(x, denoised, row, noise)
    return x


@torch.no_grad()
def sample_dpm_adaptive(
    model: Model, x: Tensor, sigma_min: float | Tensor, sigma_max: float | Tensor,
    extra_args: dict[str, Any] | None = None, callback: Callback | None = None,
    disable: bool | None = None, order: int = 3, rtol: float = 0.05, atol: float = 0.0078,
    h_init: float = 0.05, pcoeff: float = 0.0, icoeff: float = 1.0, dcoeff: float = 0.0,
    accept_safety: float = 0.81, eta: float = 0.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, return_info: bool = False,
) -> Tensor | tuple[Tensor, dict[str, int]]:  # fmt: skip
    """DPM-Solver-12 or -23 (``order`` 2 or 3): each step by that order and by the one below, whose
    difference, in units of ``rtol`` of x or ``atol``, says whether it counts and how long the next
    is (arXiv:2206.00927, section 3.4). With ``return_info`` also how many steps and calls it took.

    Each step waits for its error, on any device.
    """
    begin, end = _ends(x, sigma_min, sigma_max, eta, s_noise)
    if order not in (2, 3):
        raise InputError(f"order is {order!r}; expected 2 or 3")
    check_not_negative("rtol", rtol)
    check_not_negative("atol", atol)
    check_positive("h_init", h_init)
    controller = StepSize(pcoeff, icoeff, dcoeff, accept_safety, order=1.5 if eta else order)
    clamp = min if end > begin else max
    h = math.copysign(h_init, end - begin)
    at, low_before = begin, x
    info = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    with progress(None, disable) as advance:
        while abs(end - at) > 1e-5:
            if abs(h) < SHORTEST:
                raise InputError(
                    f"the step from sigma {math.exp(-at):.4g} has shrunk to nothing; expected "
                    f"larger tolerances than rtol {rtol} and atol {atol}"
                )
            to = clamp(end, at + h)
            leg = _leg(at, to, end, eta, s_noise)
            denoised, low, high = _of_two_orders(model, x, leg, order, extra_args, advance)
            error = _error(low, high, low_before, rtol, atol)
            factor, accepted = controller.judge(_finite(error, leg))
            h *= factor
            if accepted:
                x, at, low_before = _with_noise(high, leg, noise_sampler), to, low
            info["steps"] += 1
            info["nfe"] += order
            info["n_accept" if accepted else "n_reject"] += 1
            if callback is not None:
                t = torch.tensor(at)
                sigma = t.neg().exp()
                seen = {"sigma": sigma, "sigma_hat": sigma, "x": x, "i": info["steps"] - 1}
                seen |= {"t": t, "t_up": t, "denoised": denoised, "error": error, "h": h}
                callback(seen | info)
    return (x, info) if return_info else x


@dataclass
class StepSize:
    """A PID controller of step sizes (Söderlind 2003), its factors in the bounds of 1 + arctan
    (Söderlind & Wang 2006).

    ``order``: the power of a step's length that its error grows with. ``accept_safety``: the least
    factor of a step that counts, at most 1: a step that does not is followed by a shorter one.
    """

    pcoeff: float
    icoeff: float
    dcoeff: float
    accept_safety: float
    order: float
    recent: list[float] = field(default_factory=list)  # 1 / error of the last two that counted

    def __post_init__(self) -> None:
        for name in ("pcoeff", "icoeff", "dcoeff", "accept_safety"):
            if not is_finite(value := getattr(self, name)):
                raise InputError(f"{name} is {value!r}; expected a finite number")
        if self.accept_safety > 1:
            raise InputError(f"accept_safety is {self.accept_safety}; expected at most 1")

    def judge(self, error: float) -> tuple[float, bool]:
        """What to multiply the length by, and whether the step counts."""
        inverse = 1 / (error + 1e-8)
        self.recent = self.recent or [inverse, inverse]
        p, i, d = (value / self.order for value in (self.pcoeff, self.icoeff, self.dcoeff))
        before, before_that = self.recent
        wanted = inverse ** (p + i + d) * before ** (-p - 2 * d) * before_that**d
        factor = 1 + math.atan(wanted - 1)
        counts = factor >= self.accept_safety
        if counts:
            self.recent = [inverse, self.recent[0]]
        return factor, counts


def _of_two_orders(
    model: Model, x: Tensor, leg: Leg, order: int,
    extra_args: dict[str, Any] | None, advance: Callable[[], object],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The first x_0, and x at the end of the leg, without noise, by ``order − 1`` and ``order``.

    The lower order asks at the same points but the last, so that all it needs is one more row: the
    table's last, which reads what row ``order − 2`` reads.
    """
    points, leg = POINTS[order], replace(leg, next=leg.to)
    walk = Walk(model, x, [*_rows(leg, points), _rows(leg, points[:-1])[-1]], extra_args)
    answers = []
    for row in range(order):
        answers.append(walk.denoised(x, row))
        advance()
        if row == order - 2:
            low = walk.step(x, answers[row], order)
        x = walk.step(x, answers[row], row)
    return answers[0], low, x


def _error(low: Tensor, high: Tensor, low_before: Tensor, rtol: float, atol: float) -> Tensor:
    """(), how far the two orders are apart, of what is tolerated in each place: ``atol``, or
    ``rtol`` of the lower order's x, now or after the last step that counted."""
    wide = torch.promote_types(low.dtype, torch.float32)
    low, high, low_before = low.to(wide), high.to(wide), low_before.to(wide)
    tolerated = (rtol * torch.maximum(low.abs(), low_before.abs())).clamp(min=atol)
    return ((low - high) / tolerated).square().mean().sqrt()


def _finite(error: Tensor, leg: Leg) -> float:
    """InputError for an error that no shorter step mends."""
    value = float(error)
    if not math.isfinite(value):
        raise InputError(
            f"the step from sigma {leg.at.sigma:.4g} has the error {value}; expected a model that "
            "answers finite x_0, and atol above 0 where x may be 0"
        )
    return value


def _rows(leg: Leg, points: tuple[float, ...]) -> list[Row]:
    """Those of a step that asks at ``points``, r_i of the way in λ."""
    h = log_snr_step(leg.at, leg.to)
    levels = [level(leg.at.sigma * math.exp(-r * h)) for r in points]
    return leg.rows(levels, _weights(h, points))


def _weights(h: float, points: tuple[float, ...]) -> list[list[float]]:
    """Of the x_0 of each point, on the way to the next one, or the end.

    With ε_i = (x_i − x_0,i) / σ_i and x_i = x on the way to the point, ε_1 − ε is (x_0 − x_0,1) /
    σ_1, and ε_2 − ε is (x_0 − x_0,2 + (1 − σ_2 / σ)·w·(x_0,1 − x_0)) / σ_2, w being x_0,1's weight
    on the way to the second.
    """
    if not points:
        return []
    r_1, *others = points
    gain_1 = math.exp(r_1 * h) / r_1  # σ / (σ_1·r_1)
    if not others:
        return [[gain_1 / 2]]
    (r_2,) = others
    to_second = gain_1 * r_2 * _slope(r_2 * h)
    to_end = math.exp(r_2 * h) / r_2 * _slope(h)
    return [[to_second], [to_end * to_second * math.expm1(-r_2 * h), to_end]]


def _slope(h: float) -> float:
    """φ_2(h) / φ_1(h): what ε's change over the whole way weighs where it is linear in λ."""
    return phi(2, -h) / phi(1, -h)


def _orders(n: int) -> list[int]:
    """Of the steps that take n calls; where 3 divides n the last are 2 and 1."""
    try:
        calls = operator.index(n)
    except TypeError:
        calls = 0
    if calls < 1:
        raise InputError(f"n is {n!r}; expected how often the model is called, 1 or more")
    whole, rest = divmod(calls, 3)
    return [3] * whole + [rest] if rest else [3] * (whole - 1) + [2, 1]


def _leg(at: float, to: float, end: float, eta: float, s_noise: float) -> Leg:
    """Between two λ, of which ``eta`` is the share of noise, as of ancestral samplers; but without
    noise it leads no further than to the λ ``end`` of all steps."""
    sigma, sigma_to = math.exp(-at), math.exp(-to)
    if not eta:
        return Leg(level(sigma), level(sigma_to), level(sigma_to))
    up = sigma_to * min(1.0, eta * math.sqrt((sigma - sigma_to) * (sigma + sigma_to)) / sigma)
    down = math.sqrt((sigma_to - up) * (sigma_to + up))
    return Leg(level(sigma), level(max(math.exp(-end), down)), level(sigma_to), s_noise)


def _with_noise(x: Tensor, leg: Leg, noise_sampler: NoiseSampler | None) -> Tensor:
    """x at ``leg.to`` taken up to ``leg.next``."""
    if leg.next == leg.to:
        return x
    reached, wanted = leg.to.sigma, leg.next.sigma
    added = leg.s_noise * math.sqrt((wanted - reached) * (wanted + reached))
    noise = _drawn(x, noise_sampler, torch.tensor(leg.at.sigma), torch.tensor(wanted))
    return x + added * noise


def _drawn(x: Tensor, noise_sampler: NoiseSampler | None, *levels: Tensor) -> Tensor:
    return torch.randn_like(x) if noise_sampler is None else noise_sampler(*levels)


def _ends(
    x: Tensor, sigma_min: float | Tensor, sigma_max: float | Tensor, eta: float, s_noise: float
) -> tuple[float, float]:
    """λ where x is and where it is wanted. InputError for bad arguments."""
    check_x(x)
    check_not_negative("eta", eta)
    check_not_negative("s_noise", s_noise)
    low, high = _sigma("sigma_min", sigma_min), _sigma("sigma_max", sigma_max)
    if low == high:
        raise InputError(f"sigma_min and sigma_max are both {low}; expected two levels")
    if eta and low > high:
        raise InputError(
            f"eta is {eta}, and sigma_min {low} is above sigma_max {high}; expected eta 0 on the "
            "way from data to noise"
        )
    return -math.log(high), -math.log(low)


def _sigma(name: str, given: float | Tensor) -> float:
    value: Any = given.item() if isinstance(given, Tensor) and given.numel() == 1 else given
    check_positive(name, value)
    return value

"""k-diffusion's samplers on given ``sigmas``: each a method of ``fastdiff.methods``."""

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
from fastdiff.methods import registry
from fastdiff.methods.levels import Level, Levels, Source
from fastdiff.methods.rows import Row

# (step, row of the step) → N(0, I), or None where nothing is drawn
Noise = Callable[[int, int], Tensor | None]


@torch.no_grad()
def sample_euler(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, s_churn: float = 0.0,
    s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Euler's method (Karras et al. 2022, arXiv:2206.00364, algorithm 2 without its correction)."""
    given = (extra_args, callback, disable)
    return _churned("euler", model, x, sigmas, given, s_churn, s_tmin, s_tmax, s_noise)


@torch.no_grad()
def sample_heun(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, s_churn: float = 0.0,
    s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Heun's method (arXiv:2206.00364, algorithm 2): two calls of the model a step but the last."""
    given = (extra_args, callback, disable)
    return _churned("heun", model, x, sigmas, given, s_churn, s_tmin, s_tmax, s_noise)


@torch.no_grad()
def sample_dpm_2(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, s_churn: float = 0.0,
    s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """DPM-Solver-2 (Lu et al. 2022, arXiv:2206.00927): the second call at the middle of log σ."""
    given = (extra_args, callback, disable)
    return _churned("dpm_2", model, x, sigmas, given, s_churn, s_tmin, s_tmax, s_noise)


@torch.no_grad()
def sample_euler_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0,
    s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """Euler's method to a lower level, and noise up to the next one."""
    given = (extra_args, callback, disable)
    noise = _sampled(x, sigmas, noise_sampler, s_noise)
    return _run("euler_ancestral", model, x, sigmas, given, noise, eta=float(eta))


@torch.no_grad()
def sample_dpm_2_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0,
    s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver-2 to a lower level, and noise up to the next one."""
    given = (extra_args, callback, disable)
    noise = _sampled(x, sigmas, noise_sampler, s_noise)
    return _run("dpm_2_ancestral", model, x, sigmas, given, noise, eta=float(eta))


@torch.no_grad()
def sample_dpmpp_2s_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0,
    s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2S) (Lu et al. 2022, arXiv:2211.01095) to a lower level, and noise up again."""
    given = (extra_args, callback, disable)
    noise = _sampled(x, sigmas, noise_sampler, s_noise)
    return _run("dpmsolver++2s_ancestral", model, x, sigmas, given, noise, eta=float(eta))


@torch.no_grad()
def sample_lms(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, order: int = 4,
) -> Tensor:  # fmt: skip
    """Linear multistep: the polynomial through the last ``order`` derivatives, integrated."""
    steps = len(_checked(x, sigmas)) - 1
    if isinstance(order, int) and 1 <= order <= 4:  # k-diffusion lowers it where there are fewer
        order = min(order, steps)
    return _run("lms", model, x, sigmas, (extra_args, callback, disable), None, order=order)


@torch.no_grad()
def sample_dpmpp_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0,
    s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None, r: float = 0.5,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2S) whose middle is reached with noise too."""
    if r != 0.5:
        raise InputError(f"r is {r!r}; expected 0.5, the middle of a step in log σ")
    given = (extra_args, callback, disable)
    noise = _of_the_middle(x, sigmas, noise_sampler, s_noise)
    return _run("sde-dpmsolver++2s", model, x, sigmas, given, noise, eta=float(eta))


@torch.no_grad()
def sample_dpmpp_2m(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095)."""
    return _run("dpmsolver++", model, x, sigmas, (extra_args, callback, disable), None)


@torch.no_grad()
def sample_dpmpp_2m_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0,
    s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
) -> Tensor:  # fmt: skip
    """SDE-DPM-Solver++(2M); ``solver_type`` "midpoint" or "heun"."""
    given = (extra_args, callback, disable)
    noise = _sampled(x, sigmas, noise_sampler, s_noise) if eta else None
    options: dict[str, Any] = {"eta": float(eta), "solver_type": solver_type}
    return _run("sde-dpmsolver++", model, x, sigmas, given, noise, **options)


@torch.no_grad()
def sample_dpmpp_3m_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0,
    s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """SDE-DPM-Solver++(3M)."""
    given = (extra_args, callback, disable)
    noise = _sampled(x, sigmas, noise_sampler, s_noise) if eta else None
    return _run("sde-dpmsolver++3m", model, x, sigmas, given, noise, eta=float(eta))


def _churned(
    method: str, model: Model, x: Tensor, sigmas: Tensor, given: tuple[Any, ...],
    s_churn: float, s_tmin: float, s_tmax: float, s_noise: float,
) -> Tensor:  # fmt: skip
    """Each step begins by noise up to σ·(1 + γ): a row adds that of the step after it, and what is
    added before the first is added here. As in k-diffusion, a draw a step, used or not."""
    values = _checked(x, sigmas)
    steps = len(values) - 1
    most = min(s_churn / steps, math.sqrt(2) - 1)
    churned = [sigma for sigma in values[:-1] if s_tmin <= sigma <= s_tmax]
    gamma = most if values[0] in churned else 0.0
    lifted = values[0] * (1 + gamma)
    if churned and churned[0] * (1 + most) > lifted:
        raise InputError(
            f"churn takes sigma {churned[0]:g} to {churned[0] * (1 + most):g}, above the first, "
            f"{values[0]:g}, which s_tmax leaves out; expected another s_tmax, or less s_churn"
        )
    first = torch.randn_like(x) * s_noise
    if gamma > 0:
        x = x + first * math.sqrt(lifted**2 - values[0] ** 2)
    # Where σ does not end in 0, its end is one more level to the method: of those that share the
    # churn, but not churned.
    if values[-1] > 0:
        s_churn, s_tmin = (
            s_churn * (steps + 1) / steps,
            max(s_tmin, math.nextafter(values[-1], math.inf)),
        )
    churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax}

    def noise(step: int, call: int) -> Tensor | None:
        return torch.randn_like(x) * s_noise if step + 1 < steps else None

    return _run(method, model, x, sigmas, given, noise, begin=lifted, **churn)


def _sampled(x: Tensor, sigmas: Tensor, sampler: NoiseSampler | None, s_noise: float) -> Noise:
    """What a sampler says for each step but one to no noise, or fresh draws."""

    def noise(step: int, call: int) -> Tensor | None:
        if sigmas[step + 1] == 0:
            return None
        drawn = torch.randn_like(x) if sampler is None else sampler(sigmas[step], sigmas[step + 1])
        return drawn * s_noise

    return noise


def _of_the_middle(
    x: Tensor, sigmas: Tensor, sampler: NoiseSampler | None, s_noise: float
) -> Noise:
    """The same where a step's first row is a draw to its middle. The second row repeats a share ρ
    of that, and adds what is asked for: of a sampler's noise for the whole step what is left."""
    first = torch.zeros(())  # where the first row draws nothing

    def noise(step: int, call: int) -> Tensor | None:
        nonlocal first
        at, to = sigmas[step], sigmas[step + 1]
        if to == 0:
            return None
        if sampler is None:
            return torch.randn_like(x) * s_noise
        middle = (at * to).sqrt()
        if call == 0:
            first = sampler(at, middle) * s_noise
            return first
        share = ((at - middle) / (at - to)).sqrt()
        return (sampler(at, to) * s_noise - share * first) / (1 - share**2).sqrt()

    return noise


def _run(
    method: str, model: Model, x: Tensor, sigmas: Tensor, given: tuple[Any, ...],
    noise: Noise | None, *, begin: float | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """x at the last of ``sigmas`` by a method's rows; ``begin``: σ of the x that is given, where
    that is not the first of them."""
    extra_args, callback, disable = given
    values = _checked(x, sigmas)
    steps = len(values) - 1
    rows = _rows(method, [values[0] if begin is None else begin, *values[1:]], options)
    walk = Walk(model, x, rows, extra_args)
    calls = [i for i, row in enumerate(rows) if row.begins]
    with progress(steps, disable) as advance:
        for step in range(steps):
            first, last = calls[step], [*calls[1:], len(rows)][step] - 1
            for row in range(first, last + 1):
                denoised = walk.denoised(x, row)
                if row == first and callback is not None:
                    seen = {"x": x, "i": step, "sigma": sigmas[step]}
                    seen |= {"sigma_hat": walk.table.timesteps[row], "denoised": denoised}
                    callback(seen)
                drawn = None
                if noise is not None and (row == last or walk.table.noisy_rows[row]):
                    drawn = noise(step, row - first)
                x = walk.step(x, denoised, row, drawn)
            advance()
    return x


def _rows(method: str, values: Sequence[float], options: dict[str, Any]) -> list[Row]:
    """The method's rows on these σ, up to where the last step begins that leads beyond them."""
    ends = values[-1] > 0
    noise = np.array(values if ends else values[:-1])[::-1].copy()
    zeros, ones = np.zeros_like(noise), np.ones_like(noise)

    def between(log_snr: list[float]) -> list[Level]:
        return [level(math.exp(-value)) for value in log_snr]

    source = Source(
        levels=Levels.of(ones, noise),
        a=zeros,
        b=ones,
        mean_type="x_start",
        var_type="fixed_small",
        timesteps=noise,
        input_scale=ones,
        total=len(noise),
        between=between,
    )
    rows = registry.find(method).columns(source, **options)
    assert isinstance(rows, list)
    if not ends:
        return rows
    beyond = next(islice((i for i, row in enumerate(rows) if row.begins), len(values) - 1, None))
    return rows[:beyond]


def _checked(x: Tensor, sigmas: Tensor) -> list[float]:
    """σ as numbers. InputError for what is no schedule, and for no x."""
    check_x(x)
    if not isinstance(sigmas, Tensor) or sigmas.dim() != 1 or len(sigmas) < 2:
        came = f"{tuple(sigmas.shape)}" if isinstance(sigmas, Tensor) else type(sigmas).__name__
        raise InputError(f"sigmas: {came}; expected a tensor (K + 1,) of two numbers or more")
    values = sigmas.tolist()
    falls = all(math.isfinite(a) and a > b >= 0 for a, b in zip(values, values[1:], strict=False))
    if not falls:
        raise InputError(f"sigmas are {values}; expected finite numbers that fall, to 0 or more")
    return values

"""DPM-Solver++(2M) and its SDE form (Lu et al. 2022, arXiv:2211.01095)."""

import numpy as np

from fastdiff.methods.levels import Columns, Float64Array, Levels, Source
from fastdiff.methods.registry import method


@method("dpmsolver++")
def dpmsolver(source: Source) -> Columns:
    """DPM-Solver++(2M), midpoint form: DDIM's step with an extrapolated x_0."""
    levels = source.levels
    ratio = levels.noise_prev / levels.noise
    first_order = levels.signal_prev - levels.signal * ratio
    weight = _extrapolation(levels)
    columns = {"c": first_order * (1 + weight), "d": ratio, "e0": -first_order * weight}
    return columns | _kept(levels)


@method("sde-dpmsolver++")
def sde_dpmsolver(source: Source) -> Columns:
    """SDE-DPM-Solver++(2M), midpoint form: the posterior's step with an extrapolated x_0.

    With h = λ_prev − λ, e^−h = signal·noise_prev / (noise·signal_prev), so that the published
    signal_prev·(1 − e^−2h), (noise_prev/noise)·e^−h and noise_prev·√(1 − e^−2h) are the two
    coefficients of the posterior's mean and its standard deviation: to first order the method is
    DDPM with the small variance.
    """
    levels = source.levels
    weight = _extrapolation(levels)
    columns = {
        "c": levels.posterior_mean_coef1 * (1 + weight),
        "d": levels.posterior_mean_coef2,
        "e0": -levels.posterior_mean_coef1 * weight,
        "sigma": np.sqrt(levels.posterior_variance),
    }
    return columns | _kept(levels)


def _kept(levels: Levels) -> Columns:
    """Every row leaves its x_0 in the first slot."""
    return {"slot": np.zeros_like(levels.signal), "k": np.ones_like(levels.signal)}


def _extrapolation(levels: Levels) -> Float64Array:
    """The w of x_0 + w·(x_0 − x_0_before), which stands for x_0 in a second-order row; (K,).

    With λ = log(signal/noise), h = λ_prev − λ_t and h_0 the h of the row before, w = h / 2h_0.
    First order (w = 0) are: the first row, the last (it arrives at noise 0, λ = ∞), and of itself
    the one after a first row without signal (h_0 = ∞).
    """
    with np.errstate(divide="ignore"):
        h = -np.diff(np.log(levels.signal) - np.log(levels.noise))  # (K − 1,); t's is h[t − 1]
    weight = np.zeros_like(levels.signal)
    weight[1:-1] = 0.5 * h[:-1] / h[1:]
    return weight

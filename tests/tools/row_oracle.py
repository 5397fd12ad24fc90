"""What is known of a step table's rows: their moments for normal data, the flow of a mixture."""

import math

import numpy as np

import row_tools


def process(sigmas, *, preserving, **extra):
    """That of these σ = noise / signal, rising, with its levels between them. ``preserving``:
    signal² + noise² = 1, else signal is 1. The network's timestep is log σ."""
    sigmas = np.asarray(sigmas, dtype=np.float64)
    signal = (1 + sigmas**2) ** -0.5 if preserving else np.ones_like(sigmas)

    def at_log_snr(values):
        return process(np.exp(-np.sort(values)[::-1]), preserving=preserving, **extra)

    own = {"model_timesteps": np.log(sigmas), "at_log_snr": at_log_snr}
    return row_tools.process(signal, signal * sigmas, **own, **extra)


def evenly(steps, preserving=True, least=0.05, most=20.0):
    """K steps, λ evenly spread."""
    sigmas = np.exp(np.linspace(math.log(least), math.log(most), steps))
    return process(sigmas, preserving=preserving)


def run(table, x, x_start_of, z=None):
    """x before the first row and after each, (K + 1, …), as ``row_tools.run``."""
    return np.stack([x, *row_tools.run(table, x, x_start_of, z)])


def moments(table, mean, variance):
    """Mean and variance of x before the first row and after each, (K + 1,) both, for pixels
    N(mean, variance), their exact network, and x_T from their own marginal.

    x_0 is then affine in x, so x is affine in 1, x_T and the rows' noise: their factors are what is
    carried from row to row.
    """
    count = 2 + len(table)

    def x_start_of(x, signal, noise):
        share = signal * variance / (signal**2 * variance + noise**2)
        found = share * x
        found[0] += mean * (1 - share * signal)
        return found

    signal, noise = table.levels[0]
    first = np.zeros(count)
    first[:2] = signal * mean, math.sqrt(signal**2 * variance + noise**2)
    factors = run(table, first, x_start_of, z=np.eye(count)[2:])
    return factors[:, 0], (factors[:, 1:] ** 2).sum(1)


# --- A mixture of two normals, whose network and flow are known --------------------------------

WEIGHTS, MEANS, STD = np.array([0.35, 0.65]), np.array([-0.8, 0.5]), 0.25


def posterior_mean(x, signal, noise):
    """E[x_0 | x] for a mixture of two normals."""
    variance = signal**2 * STD**2 + noise**2
    gaps = x[..., None] - signal * MEANS
    shares = WEIGHTS * np.exp(-(gaps**2) / (2 * variance))
    each = MEANS + signal * STD**2 / variance * gaps
    return (shares * each).sum(-1) / shares.sum(-1)


def mass_below(x, signal, noise):
    """P(x_t ≤ x) of that mixture, which the flow leaves as it is along each of its curves."""
    scale = np.sqrt(2 * (signal**2 * STD**2 + noise**2))
    each = [[math.erf(gap) for gap in row] for row in (x[:, None] - signal * MEANS) / scale]
    return (WEIGHTS * (1 + np.array(each)) / 2).sum(-1)


def along_the_flow(x, start, end):
    """x at the level ``end`` on the curve through x at ``start``, by bisection."""
    wanted = mass_below(x, *start)
    low, high = np.full_like(x, -1e3), np.full_like(x, 1e3)
    for _ in range(80):
        middle = (low + high) / 2
        below = mass_below(middle, *end) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low

"""DDPM (Ho et al. 2020, eq. 6–7), with learned variances (Nichol & Dhariwal 2021, eq. 15)."""

import numpy as np

from fastdiff.methods.levels import Columns, Source
from fastdiff.methods.registry import method


@method("ddpm", learned_variance=True)
def ddpm(source: Source) -> Columns:
    """x_prev = coef1·x_0 + coef2·x_t + σ·z, by the posterior q(x_prev | x_t, x_0)."""
    levels, var_type = source.levels, source.var_type
    zero, one = np.zeros_like(levels.signal), np.ones_like(levels.signal)
    if source.mean_type == "previous_x":  # the output is the posterior mean, and is not clipped
        columns = {"o": one}
    else:
        columns = {"c": levels.posterior_mean_coef1, "d": levels.posterior_mean_coef2}
    # posterior_variance[0] is 0; t = 1 lends it a logarithm (the step at t = 0 adds no noise).
    small = levels.posterior_variance.copy()
    small[0] = small[1] if len(small) > 1 else levels.transition_variance[0]
    large = levels.transition_variance
    if var_type == "fixed_small":
        columns["sigma"] = np.sqrt(levels.posterior_variance)
    elif var_type == "fixed_large":
        columns["sigma"] = np.sqrt(large)
    elif var_type == "learned":  # f·1 + (1 − f)·(−1) = v, the log variance itself
        columns |= {"sigma": one, "log_min": -one, "log_max": one}
    else:
        columns |= {"sigma": one, "log_min": np.log(small), "log_max": np.log(large)}
    columns["sigma"] = np.append(zero[:1], columns["sigma"][1:])
    return columns

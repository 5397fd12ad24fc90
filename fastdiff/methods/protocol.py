"""What makes an object a diffusion process: the attributes that tables and samplers read."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastdiff.errors import InputError
from fastdiff.methods.levels import Float64Array


class Process(Protocol):
    """A Gaussian process of K steps, and what a network that reverses it predicts.

    GaussianDiffusion, VarianceExploding and EDM are such; so is any object with these attributes.
    The arrays are (K,), t ascending. ``Sampler`` also needs ``respace`` (as GaussianDiffusion's)
    and ``prior_std``, the standard deviation of x_T; with a ``cond_fn`` ``last_variance``, by which
    a gradient moves the mean of DDPM's last step. A process whose ``mean_type`` is of its own has
    ``x_start_coefficients``, the (a, b) of x_0 = a·x_t + b·output. Methods that take the network to
    noise levels between the steps need ``at_log_snr(values)``: a process over those λ =
    log(signal / noise), ascending or not, its own arrays in the order of falling λ.
    """

    mean_type: str
    var_type: str
    signal_scale: Float64Array  # x_t = signal_scale_t·x_0 + noise_scale_t·ε
    noise_scale: Float64Array
    input_scale: Float64Array  # what x_t is multiplied by before the network sees it
    model_timesteps: npt.NDArray[np.float32]  # what the network is given


def check_process(process: Any, *more: str) -> None:
    """InputError that names what ``process`` lacks of a Process, and of the names in ``more``."""
    missing = [name for name in (*Process.__annotations__, *more) if not hasattr(process, name)]
    if missing:
        raise InputError(
            f"a {type(process).__name__} is no diffusion process, it has no {', '.join(missing)}; "
            "expected a GaussianDiffusion, a VarianceExploding or an EDM process"
        )


def noise_levels(process: Process) -> tuple[Float64Array, Float64Array]:
    """(signal_scale, noise_scale) of what is checked to be a process."""
    check_process(process)
    return process.signal_scale, process.noise_scale

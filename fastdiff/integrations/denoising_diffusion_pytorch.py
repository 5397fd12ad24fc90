"""fastdiff under denoising-diffusion-pytorch's GaussianDiffusion.

diffusion = fastdiff.integrations.denoising_diffusion_pytorch.accelerate(diffusion)
images = diffusion.sample(batch_size=16)
"""

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastdiff import acceleration
from fastdiff.acceleration.calls import shared_arguments
from fastdiff.acceleration.fused_class import check_removable, derived, put_back
from fastdiff.errors import InputError
from fastdiff.integrations.options import check_sampler_options
from fastdiff.methods.table import StepTable
from fastdiff.models.fused import Fused
from fastdiff.sampling.sampler import Sampler

HOME = "denoising_diffusion_pytorch.denoising_diffusion_pytorch"
Float64Array = npt.NDArray[np.float64]


def accelerate(
    diffusion: Any,
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool = True,
    capture: bool | str = "auto",
    compile: bool | dict[str, Any] = False,
) -> Any:
    """Let a GaussianDiffusion sample through fastdiff; returns the object itself.

    ``sample``, ``ddim_sample`` and ``p_sample_loop`` keep their signatures and, for the same
    torch seed, their images, in [0, 1] or as ``unnormalize`` says; they leave torch's generator
    where the stock ones do. Self-conditioning and all three objectives are served. The network's
    norms and attention are fused (:func:`fastdiff.accelerate`), and the loop is a
    :class:`fastdiff.Sampler`; like it, it runs the network in eval mode. Training goes on as
    before, and a Trainer, an EMA copy, ``state_dict`` and pickles too. :func:`restore` undoes it.

    Args:
        diffusion: a GaussianDiffusion of the package, changed in place.
        dtype: the network runs under autocast of it, as the Sampler's argument says.
        channels_last: the layout of the weights of plain 2-D convolutions.
        capture: "auto", True or False: whether a step becomes a CUDA graph.
        compile: whether the network runs through torch.compile, or its keyword arguments.

    Raises:
        InputError: an object of another class: what a subclass does differently is not known.
    """
    kind: Any = type(diffusion)
    if kind.__name__ != "GaussianDiffusion" or kind.__module__ != HOME:
        raise InputError(
            f"diffusion is a {kind.__module__}.{kind.__name__}; expected a GaussianDiffusion of "
            f"{HOME} itself"
        )
    if isinstance(diffusion, Fused):
        raise InputError("this GaussianDiffusion is accelerated; restore it first")
    options = {"dtype": dtype, "capture": capture, "compile": compile}
    check_sampler_options(**options)
    if not acceleration.is_accelerated(diffusion.model):
        acceleration.accelerate(diffusion.model, channels_last=channels_last)
    diffusion._fastdiff = _State(options)
    diffusion.__class__ = _accelerated_class(kind)
    return diffusion


def restore(diffusion: Any) -> Any:
    """Undo :func:`accelerate`; returns the object. InputError for one that is not accelerated."""
    if not isinstance(diffusion, _Accelerated):
        raise InputError(f"this {type(diffusion).__name__} is not accelerated; nothing to restore")
    check_removable(diffusion)
    if acceleration.is_accelerated(diffusion.model):
        acceleration.restore(diffusion.model)
    del diffusion._fastdiff
    put_back(diffusion)
    return diffusion


class _State:
    """What an accelerated object holds: its sampler, kept for what that has captured."""

    def __init__(self, options: dict[str, Any]):
        self.options = options
        self.sampler: Sampler | None = None
        self.lock = threading.Lock()
        self.ran = "nothing was sampled yet"

    def __deepcopy__(self, memo: Any) -> "_State":
        return _State(self.options)  # a sampler belongs to one network

    def sampler_for(self, diffusion: Any, table: StepTable) -> Sampler:
        """One for this call; what it captures is kept for the next ones."""
        name = _third_argument(diffusion.model) if diffusion.self_condition else None
        with self.lock:
            made_for = self.sampler and (self.sampler.model, self.sampler.self_condition)
            if self.sampler is None or made_for != (diffusion.model, name):
                self.sampler = Sampler(diffusion.model, table, self_condition=name, **self.options)
            return copy.copy(self.sampler).configure(diffusion=table)


class _Accelerated(Fused):
    """Mixed into GaussianDiffusion."""

    _fastdiff: _State
    model: nn.Module

    def p_sample_loop(self, shape: Any, return_all_timesteps: bool = False) -> Tensor:
        """Ancestral sampling over all timesteps (Ho et al. 2020, algorithm 2)."""
        return _sample(self, shape, return_all_timesteps, ddpm_table(self))

    def ddim_sample(self, shape: Any, return_all_timesteps: bool = False) -> Tensor:
        """DDIM (Song et al. 2020) over ``sampling_timesteps`` timesteps."""
        return _sample(self, shape, return_all_timesteps, ddim_table(self))

    def explain(self) -> str:
        """How the last call ran."""
        return self._fastdiff.ran


@functools.cache
def _accelerated_class(kind: Any) -> type:
    names = ("p_sample_loop", "ddim_sample")
    members = {name: _served(getattr(_Accelerated, name), getattr(kind, name)) for name in names}
    return derived(kind, (_Accelerated, kind), members)


def _served(ours: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """Our method; the stock one where a call gives arguments that only that one knows."""
    arguments = shared_arguments(ours, stock)

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        values = arguments.understood(args, kwargs)
        return stock(self, *args, **kwargs) if values is None else ours(self, *values)

    return method


def _sample(self: Any, shape: Any, every: bool, table: StepTable) -> Tensor:
    shape = tuple(shape)
    device = self.device

    def draw() -> Tensor:
        return torch.randn(shape, device=device)

    def noise_of(t: int) -> Tensor:  # counts down to 0, where the stock loops draw none
        return draw() if t > 0 else torch.zeros((), device=device).expand(shape)

    x_T = draw()
    sampler = self._fastdiff.sampler_for(self, table)
    steps: list[Tensor] = [x_T]
    sampler.device = device
    x = sampler.sample(
        shape,
        noise=x_T,
        step_noise=noise_of,
        callback=(lambda step: steps.append(step["sample"])) if every else None,
        progress=True,
    )
    self._fastdiff.ran = sampler.explain()
    return self.unnormalize(torch.stack(steps, dim=1) if every else x)


def _third_argument(model: nn.Module) -> str:
    """The name of x_self_cond: the network is called model(x, time, x_self_cond)."""
    return list(inspect.signature(model.forward).parameters)[2]


# --- The steps, from the object's own float32 buffers -----------------------------------------


def ddpm_table(diffusion: Any) -> StepTable:
    """x_{t−1} = coef1·x_0 + coef2·x_t + σ·z for t = T − 1 … 0."""
    times = np.arange(diffusion.num_timesteps)[::-1]
    sigma = np.exp(0.5 * _buffer(diffusion, "posterior_log_variance_clipped"))
    columns = {
        "c": _buffer(diffusion, "posterior_mean_coef1")[times],
        "d": _buffer(diffusion, "posterior_mean_coef2")[times],
        "sigma": np.where(times > 0, sigma[times], 0.0),
    }
    return _table(diffusion, times, columns)


def ddim_table(diffusion: Any) -> StepTable:
    """√ᾱ'·x_0 + √(1 − ᾱ' − σ²)·ε + σ·z, with ε = (√(1/ᾱ)·x_t − x_0) / √(1/ᾱ − 1) from the clipped
    x_0, over evenly spaced t; the last step is x_0."""
    total, count = diffusion.num_timesteps, diffusion.sampling_timesteps
    every = torch.linspace(-1, total - 1, steps=count + 1).int().numpy()[::-1]
    times, following = every[:-1], every[1:]
    alphas = _buffer(diffusion, "alphas_cumprod")
    alpha, after = alphas[times], np.where(following >= 0, alphas[following], 1.0)
    sigma = diffusion.ddim_sampling_eta * np.sqrt((1 - alpha / after) * (1 - after) / (1 - alpha))
    towards = np.sqrt(1 - after - sigma**2)
    recip = _buffer(diffusion, "sqrt_recip_alphas_cumprod")[times]
    recipm1 = _buffer(diffusion, "sqrt_recipm1_alphas_cumprod")[times]
    columns = {
        "c": np.sqrt(after) - towards / recipm1,
        "d": towards * recip / recipm1,
        "sigma": sigma,
    }
    return _table(diffusion, times, columns)


def _table(diffusion: Any, times: Any, columns: dict[str, Float64Array]) -> StepTable:
    if diffusion.objective == "pred_noise":
        a = _buffer(diffusion, "sqrt_recip_alphas_cumprod")[times]
        b = -_buffer(diffusion, "sqrt_recipm1_alphas_cumprod")[times]
    elif diffusion.objective == "pred_v":
        a = _buffer(diffusion, "sqrt_alphas_cumprod")[times]
        b = -_buffer(diffusion, "sqrt_one_minus_alphas_cumprod")[times]
    else:
        a, b = np.zeros(len(times)), np.ones(len(times))
    columns = columns | {"a": a, "b": b, "clip": np.ones(len(times)), "timesteps": times}
    names = list(columns)
    rows = np.stack([columns[name] for name in names], axis=1).tolist()
    return StepTable.from_rows([dict(zip(names, row, strict=True)) for row in rows])


def _buffer(diffusion: Any, name: str) -> Float64Array:
    return getattr(diffusion, name).double().cpu().numpy()

"""Sampler: draw samples with a network, by any method a StepTable describes.

One step is: run the network at row i's timestep, apply row i, i ← i + 1.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import rng as counter_rng
from fastdiff._checks import check_device, check_float, check_shape, is_finite
from fastdiff._optional import require
from fastdiff.errors import InputError, TrainingError
from fastdiff.ops.posterior_step import posterior_step
from fastdiff.sampling_loops import StepNoise, noise_of_step
from fastdiff.step_table import StepTable, noise_levels

Model = Callable[..., Tensor]
Step = dict[str, Any]


class Sampler:
    """Samples from ``model`` by strided DDPM, DDIM or DPM-Solver++(2M).

    Args:
        model: called ``model(x, timesteps, **model_kwargs)`` with x (N, C, ...) and float32 (N,)
            timesteps; answers (N, C, ...), or (N, 2C, ...) where the process learns its variance.
            A module is run in eval mode, each of its parts being put back as it was.
        diffusion: the GaussianDiffusion or VarianceExploding process the model was trained with.
        steps: an int or a respacing string ("50", "10,15,20", "ddim25"), counted in the process's
            own steps; None takes all of them.
        method: "ddpm" (with the process's variance), "ddim" or "dpmsolver++".
        eta: of DDIM: 0 deterministic, 1 the DDPM posterior's variance.
        guidance_scale: s of classifier-free guidance, unconditional + s·(conditional −
            unconditional); the network then sees a batch of 2N. None is no guidance.
        clip_denoised: clip the predicted x_0 to [−1, 1].
        dtype: autocast dtype of the network (torch.bfloat16, ...); x_t stays float32. None runs it
            in the dtype of its parameters.
        rng: "counter": sample i of a seed is the same in any batch. "torch": torch.randn from a
            generator of that seed, x_T first and then step by step: the samples of the published
            improved-diffusion loops.
        capture: "auto" or False; True would need CUDA graphs, which this version does not have.
        device: where to sample; by default that of the model's parameters, else of ``noise``, else
            the CPU.

    Attributes: ``table``, the StepTable; ``diffusion``, the strided process.

    Raises InputError for arguments that do not fit each other.
    """

    def __init__(
        self,
        model: Model,
        diffusion: Any,
        *,
        steps: int | str | None = None,
        method: str = "ddpm",
        eta: float = 0.0,
        guidance_scale: float | None = None,
        clip_denoised: bool = True,
        dtype: torch.dtype | None = None,
        rng: str = "counter",
        capture: bool | str = "auto",
        device: torch.device | str | None = None,
    ):
        if not callable(model):
            raise InputError(f"model is a {type(model).__name__}; expected a module or a function")
        if rng not in ("counter", "torch"):
            raise InputError(f"rng is {rng!r}; expected 'counter' or 'torch'")
        if capture is True:
            raise InputError(
                "capture=True needs CUDA graph support, which this version lacks; "
                "use capture='auto' or False"
            )
        if capture not in ("auto", False):
            raise InputError(f"capture is {capture!r}; expected 'auto', True or False")
        if dtype is not None and dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(f"dtype is {dtype!r}; expected torch.float32, bfloat16 or float16")
        if guidance_scale is not None and not is_finite(guidance_scale):
            raise InputError(f"guidance_scale is {guidance_scale!r}; expected a finite number")
        noise_levels(diffusion)  # raises for what is no process
        self.model = model
        self.diffusion = diffusion if steps is None else diffusion.respace(steps)
        self.table = StepTable.from_process(
            self.diffusion, method=method, eta=eta, clip_denoised=clip_denoised
        )
        self.guidance_scale = guidance_scale
        self.dtype = dtype
        self.rng = rng
        self.device = None if device is None else check_device(device)

    def sample(
        self,
        shape: Sequence[int],
        *,
        seed: int = 0,
        first_sample: int = 0,
        noise: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        step_noise: StepNoise | None = None,
        progress: bool = False,
        callback: Callable[[Step], None] | None = None,
    ) -> Tensor:
        """Samples of ``shape`` (N, C, ...), float32 on the sampling device.

        ``progress`` shows a bar over the steps (needs tqdm); ``callback`` gets what :meth:`iterate`
        yields. The other arguments and the errors are :meth:`iterate`'s.
        """
        steps: Any = self.iterate(
            shape,
            seed=seed,
            first_sample=first_sample,
            noise=noise,
            model_kwargs=model_kwargs,
            uncond_kwargs=uncond_kwargs,
            step_noise=step_noise,
        )
        if progress:
            steps = require("tqdm.auto", "train").tqdm(steps, total=len(self.table), leave=False)
        # Under one autocast for the whole loop the weights are cast once, not at every step. The
        # steps' own are nested in it; a generator must not hold it while its caller goes on.
        device = self._device(noise)
        with self._autocast(device):
            for step in steps:
                if callback is not None:
                    with torch.autocast(device.type, enabled=False):
                        callback(step)
        return step["sample"]

    def iterate(
        self,
        shape: Sequence[int],
        *,
        seed: int = 0,
        first_sample: int = 0,
        noise: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        step_noise: StepNoise | None = None,
    ) -> Iterator[Step]:
        """Yield every step: {"step", "timestep", "sample", "pred_xstart"}.

        ``step`` counts from 0, ``timestep`` is what the network was given (a number), the tensors
        are (N, C, ...) float32: x after the step, and the x_0 it predicted.

        Args:
            shape: (N, C, ...).
            seed: of all that is drawn.
            first_sample: with rng="counter", the number of the batch's first sample: batches that
                continue the numbering give what one large batch would.
            noise: x_T, (N, C, ...), in place of a draw.
            model_kwargs: passed to the network. For guidance, tensors whose first dimension is N
                are doubled with their unconditional counterpart.
            uncond_kwargs: what replaces ``model_kwargs`` in the unconditional half; by default the
                model's ``null_label`` replaces the labels ``y``.
            step_noise: the N(0, I) draw of every step: one tensor for all, or a callable that gets
                the index t (K − 1 first, 0 last).

        Raises InputError for arguments or a network output that do not fit, TrainingError when the
        samples stop being finite (on a CPU at that step, elsewhere after the last one).
        """
        shape = check_shape(shape)
        if noise is not None:
            check_float(noise, "noise")
            if noise.shape != shape:
                raise InputError(f"noise has shape {tuple(noise.shape)}, but shape is {shape}")
        device = self._device(noise)
        draws = _Draws(self.rng, self.table, shape, device, seed, first_sample, step_noise)
        kwargs = self._network_kwargs(shape[0], dict(model_kwargs or {}), uncond_kwargs)
        return self._iterate(shape, draws, noise, kwargs)

    def _iterate(
        self,
        shape: tuple[int, ...],
        draws: "_Draws",
        noise: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Iterator[Step]:
        device = draws.device
        self.table = table = self.table.to(device)
        timesteps = table.timesteps.tolist()
        with _eval_mode(self._module):
            if noise is None:
                x = draws.x_T() * getattr(self.diffusion, "prior_std", 1.0)
            else:
                x = noise.to(device, torch.float32)
            if len(shape) == 4 and _is_channels_last(self._module):
                x = x.contiguous(memory_format=torch.channels_last)
            x_start: Tensor | None = None
            for i, timestep in enumerate(timesteps):
                # The caller's own gradient mode is back while the generator waits at the yield.
                with torch.no_grad():
                    x, x_start = posterior_step(
                        x,
                        self._run_network(x, i, kwargs),
                        table,
                        i,
                        prev_x_start=x_start,
                        guidance_scale=self.guidance_scale,
                        **draws.of_step(i),
                    )
                # Reading a value of another device would make every step wait for it.
                if device.type == "cpu" or i == len(table) - 1:
                    _check_finite(x, i, timestep)
                yield {"step": i, "timestep": timestep, "sample": x, "pred_xstart": x_start}

    def _run_network(self, x: Tensor, i: int, kwargs: dict[str, Any]) -> Tensor:
        """The network's output at row i: (N or 2N, C or 2C, ...)."""
        if self.table.scales_input:
            x = x * self.table.input_scale[i]
        if self.guidance_scale is not None:
            x = torch.cat([x, x])
        timesteps = self.table.timesteps[i].expand(x.shape[0])
        parameter = _first_parameter(self._module)
        if parameter is not None:
            x = x.to(parameter.dtype)
        with self._autocast(x.device):
            return self.model(x, timesteps, **kwargs)

    def _autocast(self, device: torch.device) -> AbstractContextManager:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(
            device.type,
            dtype=None if self.dtype == torch.float32 else self.dtype,
            enabled=self.dtype != torch.float32,
        )

    def _network_kwargs(
        self, count: int, given: dict[str, Any], uncond_kwargs: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """What the network is passed; under guidance, for a batch of 2N."""
        if self.guidance_scale is None:
            if uncond_kwargs is not None:
                raise InputError("uncond_kwargs belong to guidance; give guidance_scale too")
            return given
        uncond = dict(uncond_kwargs or {})
        null_label = getattr(self.model, "null_label", None)
        if "y" in given and "y" not in uncond and null_label is not None:
            uncond["y"] = torch.full_like(given["y"], null_label)
        if not uncond:
            raise InputError(
                "guidance needs to know what unconditional means: a model with a null class and "
                "labels y in model_kwargs, or uncond_kwargs"
            )
        unknown = sorted(set(uncond) - set(given))
        if unknown:
            raise InputError(f"uncond_kwargs has {unknown[0]!r}, which model_kwargs has not")
        return {
            name: _double(name, value, uncond.get(name), count) for name, value in given.items()
        }

    @property
    def _module(self) -> nn.Module | None:
        """The model as a module: itself, or the one it is a method of."""
        for candidate in (self.model, getattr(self.model, "__self__", None)):
            if isinstance(candidate, nn.Module):
                return candidate
        return None

    def _device(self, noise: Tensor | None) -> torch.device:
        if self.device is not None:
            return self.device
        parameter = _first_parameter(self._module)
        if parameter is not None:
            return parameter.device
        return torch.device("cpu") if noise is None else noise.device


class _Draws:
    """Where x_T and the noise of every step come from."""

    def __init__(
        self,
        kind: str,
        table: StepTable,
        shape: tuple[int, ...],
        device: torch.device,
        seed: int,
        first_sample: int,
        step_noise: StepNoise | None,
    ):
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise InputError(f"seed is {seed!r}; expected an integer, 0 ≤ seed < 2⁶⁴")
        if kind == "torch" and first_sample != 0:
            raise InputError(
                "first_sample numbers the samples of rng='counter'; rng='torch' has no numbering"
            )
        self.table, self.shape, self.device = table, shape, device
        self.seed, self.first_sample, self.step_noise = seed, first_sample, step_noise
        self.generator = torch.Generator(device).manual_seed(seed) if kind == "torch" else None

    def x_T(self) -> Tensor:
        if self.generator is not None:
            return self._randn()
        return counter_rng.normal(
            self.shape,
            seed=self.seed,
            step=counter_rng.X_T_STEP,
            first_sample=self.first_sample,
            device=self.device,
        )

    def of_step(self, i: int) -> dict[str, Any]:
        """posterior_step's arguments for the noise of row i."""
        if self.step_noise is not None:
            return {"noise": noise_of_step(self.step_noise, len(self.table) - 1 - i)}
        if self.generator is None:
            return {"seed": self.seed, "first_sample": self.first_sample}
        # The published loops draw at quiet rows too (the last; every one of DDIM with eta = 0).
        # Nothing is drawn after those, so leaving them out changes no sample.
        return {"noise": self._randn()} if self.table.noisy_rows[i] else {}

    def _randn(self) -> Tensor:
        return torch.randn(self.shape, generator=self.generator, device=self.device)


@contextmanager
def _eval_mode(module: nn.Module | None) -> Iterator[None]:
    """Eval mode inside; afterwards, whatever happened, each submodule is back in its own mode."""
    training = [] if module is None else [part for part in module.modules() if part.training]
    if module is not None and training:
        module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _first_parameter(module: nn.Module | None) -> Tensor | None:
    parameters = iter(()) if module is None else module.parameters()
    return next((p for p in parameters if p.is_floating_point()), None)


def _is_channels_last(module: nn.Module | None) -> bool:
    return module is not None and any(
        p.dim() == 4
        and p.is_contiguous(memory_format=torch.channels_last)
        and not p.is_contiguous()
        for p in module.parameters()
    )


def _double(name: str, value: Any, uncond: Any, count: int) -> Any:
    """The conditional and the unconditional value of one keyword argument, for a batch of 2N."""
    batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count
    if not batched:
        if uncond is None:
            return value
        raise InputError(
            f"model_kwargs[{name!r}] has an unconditional counterpart, so it must be a tensor "
            f"whose first dimension is the batch, {count}"
        )
    other = value if uncond is None else uncond
    if not isinstance(other, Tensor) or other.shape != value.shape:
        came = tuple(other.shape) if isinstance(other, Tensor) else type(other).__name__
        raise InputError(
            f"uncond_kwargs[{name!r}] is {came}; expected the shape of model_kwargs[{name!r}], "
            f"{tuple(value.shape)}"
        )
    return torch.cat([value, other.to(value)])


def _check_finite(x: Tensor, i: int, timestep: float) -> None:
    if not torch.isfinite(x).all():
        raise TrainingError(
            f"the samples are not finite after step {i} (timestep {timestep:g}): the network "
            "answered NaN or infinity there or before; use an earlier checkpoint, or another dtype"
        )

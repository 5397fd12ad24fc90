"""DDPMPipeline and DDIMPipeline on the captured Sampler."""

import copy
import functools
import threading
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from fastdiff.acceleration import accelerate, is_accelerated, restore
from fastdiff.acceleration.calls import shared_arguments
from fastdiff.acceleration.fused_class import check_removable, derived, put_back
from fastdiff.errors import InputError
from fastdiff.integrations.diffusers.ddim import DDIMScheduler
from fastdiff.integrations.diffusers.dpmsolver_multistep import DPMSolverMultistepScheduler
from fastdiff.integrations.diffusers.generators import check_generators
from fastdiff.integrations.diffusers.schedulers import SCHEDULERS, as_called
from fastdiff.integrations.options import check_sampler_options
from fastdiff.models.fused import Fused
from fastdiff.sampling.sampler import Sampler

PIPELINES = (diffusers.DDPMPipeline, diffusers.DDIMPipeline)
Generators = torch.Generator | list[torch.Generator] | None
# Pipelines may share a U-Net or a scheduler, in several threads: held while one makes ready what a
# call needs of them. The call itself holds nothing.
_preparing = threading.RLock()
# The U-Nets that pipelines have accelerated, and the pipelines that run on them.
_users: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[_State]]"
_users = weakref.WeakKeyDictionary()


def accelerate_pipeline(
    pipe: Any,
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool = True,
    capture: bool | str = "auto",
    compile: bool | dict[str, Any] = False,
    executor: bool | str = "auto",
) -> Any:
    """Let a DDPMPipeline or DDIMPipeline run through fastdiff; returns the pipeline itself.

    Its call keeps its signature, its result and, for the same generator, its images; class labels
    of a conditional U-Net are a further argument, ``class_labels`` (N,). The U-Net is accelerated
    (:func:`fastdiff.accelerate`), the scheduler becomes the fused one of the same class, and the
    loop a :class:`fastdiff.Sampler`. x_t stays float32 in the loop, where diffusers rounds it to
    the U-Net's dtype.

    What is set afterwards counts: another U-Net is accelerated and another scheduler exchanged at
    the next call; a moved or cast U-Net, other weights, LoRA layers and attention processors are
    seen. What fastdiff cannot express (schedulers of other classes, dynamic thresholding, offloaded
    models) runs through diffusers' own loop with a warning; ``pipe.explain()`` says how the last
    call ran. A saved pipeline is a stock one. :func:`restore_pipeline` undoes it.

    Pipelines may share a U-Net or a scheduler, also in several threads; a U-Net that pipelines have
    accelerated is put back when the last of them is restored.

    Args:
        pipe: a DDPMPipeline or a DDIMPipeline, changed in place.
        dtype: the network runs under autocast of it, as the Sampler's argument says.
        channels_last: the layout of x and of the weights of plain 2-D convolutions.
        capture: "auto", True or False: whether a step becomes a CUDA graph.
        compile: whether the network runs through torch.compile, or its keyword arguments.
        executor: whether the U-Net runs as a program, as the Sampler's argument says.

    Raises:
        InputError: another pipeline, or options that do not fit.
    """
    if type(pipe) not in PIPELINES:
        known = ", ".join(kind.__name__ for kind in PIPELINES)
        raise InputError(f"pipe is a {type(pipe).__name__}; expected a {known}")
    options = {"dtype": dtype, "capture": capture, "compile": compile, "executor": executor}
    check_sampler_options(**options)
    kind: Any = type(pipe)
    pipe.__class__ = _accelerated_class(kind)
    pipe._fastdiff = _State(options, channels_last=channels_last)
    try:
        with _preparing:
            pipe._fastdiff.prepare(pipe)
    except BaseException:
        restore_pipeline(pipe)
        raise
    return pipe


def restore_pipeline(pipe: Any) -> Any:
    """Undo :func:`accelerate_pipeline`; returns the pipeline. InputError for one that is not
    accelerated."""
    if not isinstance(pipe, _Accelerated):
        raise InputError(f"this {type(pipe).__name__} is not accelerated; nothing to restore")
    check_removable(pipe)
    state = pipe._fastdiff
    with _preparing:
        for unet in state.unets():
            if len(_users[unet]) == 1 and is_accelerated(unet):
                restore(unet)
            _users[unet].discard(state)
            if not _users[unet]:
                del _users[unet]
        if pipe.scheduler is state.scheduler:
            pipe.scheduler = state.stock_scheduler
        state.close()
        put_back(pipe)
        del pipe._fastdiff
    return pipe


class _State:
    """What an accelerated pipeline holds: the sampler of its U-Net, and what it was made for."""

    def __init__(self, options: dict[str, Any], channels_last: bool):
        self.options, self.channels_last = options, channels_last
        self.sampler: Sampler | None = None
        self.unet: weakref.ref[nn.Module] | None = None
        self.scheduler: Any = None  # ours, and the one in whose place it is
        self.stock_scheduler: Any = None
        self.ran = "nothing was sampled yet"
        self.warned_of: set[str] = set()

    def __deepcopy__(self, memo: Any) -> "_State":
        """Of a copied pipeline, without the sampler, which belongs to one U-Net."""
        twin = _State(self.options, self.channels_last)
        for unet in copy.deepcopy(self.unets(), memo):
            _users.setdefault(unet, weakref.WeakSet()).add(twin)
        held = (self.scheduler, self.stock_scheduler)
        twin.scheduler, twin.stock_scheduler = copy.deepcopy(held, memo)
        return twin

    def unets(self) -> list[nn.Module]:
        return [unet for unet, users in _users.items() if self in users]

    def prepare(self, pipe: Any) -> str | None:
        """Accelerate what is new in the pipeline; why diffusers' own loop has to run, if it has."""
        ours = SCHEDULERS.get(type(pipe.scheduler))
        if ours is not None:
            self.stock_scheduler, self.scheduler = pipe.scheduler, _same_scheduler(pipe, ours)
            pipe.scheduler = self.scheduler
        if type(pipe.scheduler) not in SCHEDULERS.values():
            return f"its scheduler is a {type(pipe.scheduler).__name__}"
        if hasattr(pipe.unet, "_hf_hook"):
            return "its U-Net is offloaded"
        dtypes = {parameter.dtype for parameter in pipe.unet.parameters()}
        if not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
            return f"its U-Net has weights in {', '.join(sorted(map(str, dtypes)))}"
        if not is_accelerated(pipe.unet):
            accelerate(pipe.unet, channels_last=self.channels_last)
            _users.setdefault(pipe.unet, weakref.WeakSet())
        if pipe.unet in _users:  # and not accelerated by somebody else
            _users[pipe.unet].add(self)
        return None

    def sampler_for(self, unet: nn.Module, table: Any, device: torch.device) -> Sampler:
        """One for this call; what it captures is kept for the next ones."""
        if self.sampler is None or self.unet is None or self.unet() is not unet:
            self.close()
            self.sampler, self.unet = Sampler(unet, table, **self.options), weakref.ref(unet)
        sampler = copy.copy(self.sampler)
        sampler.device = device
        return sampler.configure(diffusion=table)

    def close(self) -> None:
        if self.sampler is not None:
            self.sampler.close()
        self.sampler = None

    def falls_back(self, reason: str) -> None:
        ran = self.ran = f"diffusers' own loop: {reason}"
        with _preparing:
            is_new = reason not in self.warned_of
            self.warned_of.add(reason)
        if is_new:
            warnings.warn(f"the pipeline runs through {ran}", RuntimeWarning, stacklevel=4)


def _same_scheduler(pipe: Any, ours: Any) -> Any:
    """The pipeline's scheduler as one of ours, with whatever was changed in it."""
    made = ours.__new__(ours)
    made.__dict__.update({k: v for k, v in vars(pipe.scheduler).items() if k != "__module__"})
    return made


class _Accelerated(Fused):
    """Mixed into the pipeline's class."""

    _fastdiff: _State
    unet: Any
    scheduler: Any

    def explain(self) -> str:
        """How the last call ran."""
        return self._fastdiff.ran

    def _run(
        self,
        batch_size: int,
        generator: Generators,
        num_inference_steps: int,
        class_labels: Any,
        output_type: str | None,
        return_dict: bool,
        **step_options: Any,
    ) -> Any:
        """The images, or None where diffusers' own loop has to draw them."""
        pipe: Any = self
        labels = _labels(class_labels, batch_size, pipe)
        state = pipe._fastdiff
        with _preparing:
            reason = state.prepare(pipe)
            device, config = pipe._execution_device, pipe.unet.config
            if reason is None:
                pipe.scheduler.set_timesteps(num_inference_steps)
                reason, rows = _rows(pipe, step_options)
            if reason is None:
                table, std = as_called(pipe.scheduler, rows.table)
                sampler = state.sampler_for(pipe.unet, table, device)
        if reason is not None:
            if labels is not None:
                raise InputError(f"class_labels need fastdiff's loop, which cannot run: {reason}")
            state.falls_back(reason)
            return None
        size = config.sample_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        shape = (batch_size, config.in_channels, *sides)

        def draw(dtype: torch.dtype = pipe.unet.dtype) -> Tensor:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)

        solver = isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
        noise_dtype = torch.float32 if solver else pipe.unet.dtype

        def noise_of(t: int) -> Tensor:  # counts down to 0
            drawn = rows.draws[len(rows.table) - 1 - t]
            return draw(noise_dtype) if drawn else torch.zeros((), device=device).expand(shape)

        with pipe.progress_bar(total=len(rows.table)) as bar:
            x = sampler.sample(
                shape,
                noise=draw().float() * std,
                step_noise=noise_of if any(rows.draws) else None,
                model_kwargs={} if labels is None else {"class_labels": labels},
                progress=bar.update,
            )
        state.ran = sampler.explain()
        return _output(pipe, x, output_type, return_dict)


class _DDPM(_Accelerated):
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 1000,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        class_labels: Sequence[int] | Tensor | None = None,
    ) -> Any:
        check_generators(generator, batch_size)
        call = (batch_size, generator, num_inference_steps)
        output = self._run(*call, class_labels, output_type, return_dict)
        if output is None:
            pipe: Any = super()
            output = pipe.__call__(*call, output_type, return_dict)
        return output


class _DDIM(_Accelerated):
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        class_labels: Sequence[int] | Tensor | None = None,
    ) -> Any:
        check_generators(generator, batch_size, one_for_all=False)
        output = self._run(
            batch_size,
            generator,
            num_inference_steps,
            class_labels,
            output_type,
            return_dict,
            eta=eta,
            use_clipped_model_output=bool(use_clipped_model_output),
        )
        if output is None:
            pipe: Any = super()
            given = (eta, num_inference_steps, use_clipped_model_output, output_type, return_dict)
            output = pipe.__call__(batch_size, generator, *given)
        return output


@functools.cache
def _accelerated_class(kind: Any) -> type:
    mixin: Any = _DDIM if kind is diffusers.DDIMPipeline else _DDPM
    return derived(kind, (mixin, kind), {"__call__": _served(mixin.__call__, kind.__call__)})


def _served(ours: Any, stock: Any) -> Any:
    """Our call; the stock one where arguments are given that only another diffusers knows."""
    arguments = shared_arguments(ours, stock)

    @functools.wraps(ours)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(kwargs)
        labels = given.pop("class_labels", None)
        values = arguments.understood(args, given)
        if values is None:
            return stock(self, *args, **kwargs)
        return ours(self, *values, class_labels=labels)

    return call


def _rows(pipe: Any, step_options: dict[str, Any]) -> tuple[str | None, Any]:
    """(why the scheduler's steps are no table, or None; its rows)."""
    doubled = pipe.unet.config.out_channels == 2 * pipe.unet.config.in_channels
    if not isinstance(pipe.scheduler, DDIMScheduler):
        step_options = {}
    device = pipe._execution_device
    rows = pipe.scheduler.sampling_rows(device, doubled_output=doubled, **step_options)
    if isinstance(rows, str):
        return rows, None
    refusal = next((reason for reason in rows.refusals if reason), None)
    return refusal, rows


def _labels(given: Any, batch_size: int, pipe: Any) -> Tensor | None:
    if given is None:
        return None
    if pipe.unet.class_embedding is None:
        raise InputError("class_labels were given, but the U-Net is not class-conditional")
    try:
        labels = torch.as_tensor(given, device=pipe._execution_device)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"class_labels are {given!r}; expected integers, one an image") from None
    classes = pipe.unet.config.num_class_embeds
    if classes is not None and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise InputError(f"class_labels are {labels.dtype}; expected integers, one an image")
    if labels.shape != (batch_size,):
        raise InputError(
            f"class_labels have shape {tuple(labels.shape)}; expected ({batch_size},), one an image"
        )
    if classes is not None and not ((labels >= 0) & (labels < classes)).all():
        raise InputError(f"class_labels are {labels.tolist()}; expected 0 … {classes - 1}")
    return labels


def _output(pipe: Any, x: Tensor, output_type: str | None, return_dict: bool) -> Any:
    """As the pipelines give their images: [0, 1], "pt" (N, C, H, W), "np" (N, H, W, C), or PIL."""
    images: Any = (x / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        images = images.to(pipe.unet.dtype)
    else:
        images = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = pipe.numpy_to_pil(images)
    pipe.maybe_free_model_hooks()
    return diffusers.ImagePipelineOutput(images=images) if return_dict else (images,)

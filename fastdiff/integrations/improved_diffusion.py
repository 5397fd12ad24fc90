"""fastdiff inside the diffusion objects of improved-diffusion, guided-diffusion and DiT.

    diffusion = fastdiff.integrations.improved_diffusion.accelerate(diffusion)

Nothing of those packages is imported: fastdiff/integrations/published_object.py reads an object's
attributes, and compares what it computes with what fastdiff computes in its place.
"""

import copy
import functools
import inspect
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.acceleration.calls import MISSING, is_same
from fastdiff.errors import InputError
from fastdiff.integrations.options import check_sampler_options
from fastdiff.integrations.published_object import (
    EXPECTED,
    check_loops,
    gives_integers,
    process_of,
    signature_of,
)
from fastdiff.optional import require
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.published_loops import initial_x
from fastdiff.process.reverse import Model
from fastdiff.process.update import CondFn, DenoisedFn
from fastdiff.sampling.network.network import module_of
from fastdiff.sampling.sampler import Sampler

LOOPS = {"p_sample_loop": "ddpm", "ddim_sample_loop": "ddim"}
SERVED = (
    *("q_mean_variance", "q_sample", "q_posterior_mean_variance"),
    *("p_mean_variance", "p_sample", "ddim_sample", "ddim_reverse_sample"),
    *("training_losses", "calc_bpd_loop"),
)


def accelerate(
    diffusion: Any,
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool | None = None,
    capture: bool | str = "auto",
    compile: bool | dict[str, Any] = False,
    executor: bool | str = "auto",
) -> "AcceleratedDiffusion":
    """``diffusion`` with the same methods, computed by fastdiff.

    Args:
        diffusion: a GaussianDiffusion or SpacedDiffusion of improved-diffusion, guided-diffusion,
            DiT, or of a codebase that took it over. It is left as it is.
        dtype: of the sampling loops, as are the others: see :class:`fastdiff.Sampler`.
        channels_last: the layout of x and of the weights.
        capture: whether a step becomes a CUDA graph.
        compile: whether the network runs through torch.compile.
        executor: whether U-Nets run as programs.

    Raises InputError for an object that computes, asks for or draws something else than these
    codebases do, naming the method: a subclass with a p_mean_variance of its own, for one.
    """
    options: dict[str, Any] = {"dtype": dtype, "channels_last": channels_last, "capture": capture}
    options |= {"compile": compile, "executor": executor}
    check_sampler_options(**options)
    return AcceleratedDiffusion(diffusion, **options)


class AcceleratedDiffusion:
    """What :func:`accelerate` answers.

    ``p_sample_loop``, ``ddim_sample_loop`` and their ``_progressive`` forms run through a
    ``fastdiff.Sampler``; ``SERVED`` are those of ``fastdiff.GaussianDiffusion``; every other
    attribute is the given object's. Arguments have the names and the order of the given object's.

    Equal seeds of PyTorch's global generators give equal samples, up to rounding, and leave the
    generators in the same state: x_T, then one draw at every step. Models get the timesteps in the
    given object's type (int64 unless rescaled), and are run in the mode they are in: one with a
    part in train mode runs without graphs or cast weights, because its dropout draws too. Samples
    are float32; a progressive loop yields copies, so that writing into them steers nothing.

    A sampler, with its graphs and cast weights, is kept for each model, as long as the model lives.
    """

    def __init__(self, diffusion: Any, **options: Any):
        self.given, self.options = diffusion, options
        self.process = process_of(diffusion)
        check_loops(diffusion)
        self.gives_integers = gives_integers(diffusion, self.process)
        for name in SERVED:
            self._replace(name, self._on_process(name))
        for name, method in LOOPS.items():
            self._replace(name, functools.partial(self._sample, method))
            self._replace(f"{name}_progressive", functools.partial(self._iterate, method))

    def __getattr__(self, name: str) -> Any:
        if name == "given" or name.startswith("__"):  # unpickling asks before there is anything
            raise AttributeError(name)
        return getattr(self.given, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(accelerate, **self.options), (self.given,)

    def _replace(self, name: str, ours: Callable) -> None:
        """Make ``ours`` the method ``name``, if the given object has it, called as there. Where a
        call gives an optional argument that the published one has not, the given one answers."""
        if not hasattr(self.given, name):
            return
        signature = signature_of(self.given, name)
        known = inspect.signature(getattr(GaussianDiffusion, name)).parameters
        unknown = {p.name: p.default for p in signature.parameters.values() if p.name not in known}
        needed = [argument for argument, default in unknown.items() if default is MISSING]
        if needed:
            raise InputError(
                f"{name} of a {type(self.given).__name__} has an argument {needed[0]!r} that the "
                f"published one has not; expected {EXPECTED}"
            )

        theirs = getattr(self.given, name)

        @functools.wraps(theirs)
        def method(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs).arguments
            for argument in unknown.keys() & arguments.keys():
                if not is_same(arguments.pop(argument), unknown[argument]):
                    return theirs(*args, **kwargs)
            return ours(**arguments)

        method.__signature__ = signature  # type: ignore[attr-defined]
        setattr(self, name, method)

    def _on_process(self, name: str) -> Callable:
        def call(**arguments: Any) -> Any:
            for function in ("model", "cond_fn"):
                if arguments.get(function) is not None:
                    arguments[function] = self._called(arguments[function])
            return getattr(self.process, name)(**arguments)

        return call

    def _called(self, function: Callable) -> Callable:
        """A model or cond_fn that is given timesteps of the published type."""
        return _with_integers(function) if self.gives_integers else function

    def _sample(self, method: str, *, progress: bool = False, **arguments: Any) -> Tensor:
        sampler, call = self._begin(method, **arguments)
        return sampler.sample(**call, progress=bool(progress))

    def _iterate(
        self, method: str, *, progress: bool = False, **arguments: Any
    ) -> Iterator[dict[str, Tensor]]:
        sampler, call = self._begin(method, **arguments)
        steps = sampler.iterate(**call)
        if progress:
            steps = require("tqdm.auto", "train").tqdm(steps, total=self.process.num_timesteps)
        for step in steps:
            yield {"sample": step["sample"], "pred_xstart": step["pred_xstart"]}

    def _begin(
        self,
        method: str,
        *,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        eta: float = 0.0,
    ) -> tuple[Sampler, dict[str, Any]]:
        """A sampler that is set up for one loop, and what to call it with. Draws x_T."""
        module = module_of(model)
        trains = module is not None and any(part.training for part in module.modules())
        if self.options["capture"] is True and (trains or cond_fn is not None):
            reason = "a model in train mode" if trains else "cond_fn"
            raise InputError(f"{reason} cannot be captured: use capture='auto' or False")
        x = initial_x(module, shape, noise, device, None)
        sampler = copy.copy(self._sampler(model, trains))  # this call's own, with what is kept
        sampler.device, sampler.denoised_fn = x.device, denoised_fn
        sampler.cond_fn = None if cond_fn is None else self._called(cond_fn)
        sampler.configure(method=method, eta=eta, clip_denoised=bool(clip_denoised))
        # The published loops draw at every step, whether the noise is used or not.
        draws: dict[str, Any] = {"noise": x, "step_noise": lambda t: torch.randn_like(x).float()}
        return sampler, {"shape": shape, "model_kwargs": model_kwargs} | draws

    def _sampler(self, model: Model, trains: bool) -> Sampler:
        """The sampler kept for this model, or a new one."""

        def make() -> Sampler:
            called = self._called(model)
            if not trains:
                return Sampler(called, self.process, **self.options)
            return Sampler(_Hidden(called), self.process, **self.options | {"capture": False})

        # A method is another object each time it is named.
        owner: Any = model
        function: Any = None
        if isinstance(model, types.MethodType):
            owner, function = model.__self__, model.__func__
        return _Samplers.of(owner).get((self.process, function, trains), make)


def _with_integers(function: Callable) -> Callable:
    def with_integers(x: Tensor, timesteps: Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(x, timesteps.long(), *args, **kwargs)

    return with_integers


class _Hidden:
    """A model whose modules Sampler does not find, and so does not put into eval mode."""

    __slots__ = ("model",)

    def __init__(self, model: Model):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class _Samplers:
    """The samplers of one model. They hold the model, so it holds them: all go together."""

    ATTRIBUTE = "_fastdiff_samplers"
    MOST = 4
    finding = threading.Lock()

    def __init__(self, owner: Any):
        self.owner = owner
        self.lock = threading.Lock()
        self.kept: OrderedDict[tuple, Sampler] = OrderedDict()

    @classmethod
    def of(cls, owner: Any) -> "_Samplers":
        with cls.finding:
            found = getattr(owner, "__dict__", {}).get(cls.ATTRIBUTE)
            if not isinstance(found, cls) or found.owner is not owner:  # a copy's: the original's
                found = cls(owner)
                if isinstance(getattr(owner, "__dict__", None), dict):
                    owner.__dict__[cls.ATTRIBUTE] = found
            return found

    def get(self, key: tuple, make: Callable[[], Sampler]) -> Sampler:
        with self.lock:
            sampler = self.kept.pop(key, None) or make()
            self.kept[key] = sampler
            if len(self.kept) > self.MOST:
                self.kept.popitem(last=False)
            return sampler

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()  # copies and files of the model hold none, and nothing of fastdiff

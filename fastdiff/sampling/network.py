"""How a sampler runs its model: eval mode, dtype, layout, weights."""

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.sampling.attributes import attributes_of
from fastdiff.sampling.packing import Packing
from fastdiff.sampling.weights import Weights

Model = Callable[..., Tensor]


class Network:
    """``model`` run under autocast of ``dtype`` (None: the caller's) with weights cast beforehand.

    ``channels_last``: x and 4-D weights in that layout; None: as the weights are.
    ``compile``: False, True or torch.compile's keyword arguments.
    """

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype | None,
        channels_last: bool | None,
        compile: bool | dict[str, Any],
    ):
        self.model, self.dtype = model, dtype
        self.module = module_of(model)
        self.call = model
        if compile is not False:
            self.call = torch.compile(model, **({} if compile is True else compile))
        self.compiles = compile is not False
        # Inductor then captures graphs of its own, which ours cannot hold.
        modes = ("reduce-overhead", "max-autotune")
        self.captures = isinstance(compile, dict) and compile.get("mode") in modes
        self.asked_channels_last = channels_last
        self.weights = Weights(self.module, dtype, bool(channels_last))
        self.packing = Packing(None if self.compiles else self.module, dtype)
        self.sampling_calls = self.uses = 0
        self.training: list[nn.Module] = []

    def __call__(self, x: Tensor, timesteps: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The output, (N, C or 2C, ...), for x (N, C, ...) and float32 (N,) timesteps."""
        parameter = first_parameter(self.module)
        plain = self.dtype in (None, torch.float32)
        if plain and parameter is not None and parameter.dtype != x.dtype:
            x = x.to(parameter.dtype)
        with self.in_use(), self.autocast(x.device):
            output = self.call(x, timesteps, **kwargs)
        return output if isinstance(output, Tensor) else getattr(output, "sample", output)

    def attributes(self) -> tuple[Any, ...]:
        """The values of the modules' Python attributes, to be compared with ``==``."""
        return tuple(map(attributes_of, self.module.modules())) if self.module is not None else ()

    @property
    def device(self) -> torch.device | None:
        parameter = first_parameter(self.module)
        return None if parameter is None else parameter.device

    @property
    def channels_last(self) -> bool:
        """Whether x is to be channels_last."""
        if self.asked_channels_last is not None:
            return self.asked_channels_last
        return self.module is not None and any(
            p.dim() == 4
            and p.is_contiguous(memory_format=torch.channels_last)
            and not p.is_contiguous()
            for p in self.module.parameters()
        )

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The sampler's copies of weights are the module's inside; may be nested."""
        if self.uses:
            yield
            return
        with self.weights.in_use(), self.packing.in_use():
            self.uses += 1
            try:
                yield
            finally:
                self.uses -= 1

    def autocast(self, device: torch.device) -> AbstractContextManager:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(
            device.type,
            dtype=None if self.dtype == torch.float32 else self.dtype,
            enabled=self.dtype != torch.float32,
            cache_enabled=False,  # the weights are cast; a capture must not meet a cached cast
        )

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Eval mode inside, with weights as they are now. When the last of nested calls is over,
        each submodule is back in its own mode, whatever happened."""
        if not self.sampling_calls and self.module is not None:
            self.training = [part for part in self.module.modules() if part.training]
            if self.training:
                self.module.eval()
        self.sampling_calls += 1
        try:
            if not self.uses:  # a call inside another one's steps runs on what that one does
                self.packing.refresh()
                self.weights.refresh(kept=self.packing.weights())
            yield
        finally:
            self.sampling_calls -= 1
            if not self.sampling_calls:
                self.packing.forget()
                for part in self.training:
                    part.training = True


def module_of(model: Any) -> nn.Module | None:
    """The model as a module: itself, or what it calls. Of a function the modules are looked for in
    the object it is a method of, its closure, the globals it names, and what a partial binds."""
    found = list(dict.fromkeys(_modules(model, depth=3)))
    if len(found) > 1:
        return nn.ModuleList(found)
    return found[0] if found else None


def _modules(value: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth and isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _modules(part, depth - 1)
    elif depth and isinstance(value, types.MethodType):
        yield from _modules(value.__self__, depth - 1)
        yield from _modules(value.__func__, depth - 1)
    elif depth and isinstance(value, types.FunctionType):
        bound = inspect.getclosurevars(value)
        for part in (*bound.nonlocals.values(), *bound.globals.values()):
            yield from _modules(part, depth - 1)
    elif depth and callable(value) and not isinstance(value, type):
        for part in getattr(value, "__dict__", {}).values():
            yield from _modules(part, 0)


def first_parameter(module: nn.Module | None) -> Tensor | None:
    parameters = iter(()) if module is None else module.parameters()
    return next((p for p in parameters if p.is_floating_point()), None)

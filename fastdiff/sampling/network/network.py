"""How a sampler runs its model: eval mode, dtype, layout, weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.eval_mode import eval_mode
from fastdiff.models.layouts import plain_convolutions
from fastdiff.models.replicas.opening import modules_in
from fastdiff.models.replicas.replica import Replica
from fastdiff.models.replicas.twin import Twin
from fastdiff.models.wrappers import tensor_of
from fastdiff.sampling.network.attributes import attributes_of
from fastdiff.sampling.network.execution import Executed, Features, Programs
from fastdiff.sampling.network.packing import PackedConvolution, packable
from fastdiff.sampling.network.padding import PaddedConvolution, paddable
from fastdiff.sampling.network.weights import Weights, signature

Model = Callable[..., Tensor]
Forward = PackedConvolution | PaddedConvolution | Executed


class Network:
    """A replica of ``model`` under autocast of ``dtype`` (None: the caller's) with weights cast
    beforehand. The model itself is left alone, whoever uses it meanwhile.

    ``channels_last``: x and the weights of plain 2-D convolutions in that layout; None: as the
    weights are.
    ``compile``: False, True or torch.compile's keyword arguments.
    ``executor``: whether UNets run as programs of fused operations: "auto" (where that pays), True
    or False; ``exact``: by products of float32 values themselves.
    """

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype | None,
        channels_last: bool | None,
        compile: bool | dict[str, Any],
        executor: bool | str = "auto",
        exact: bool = False,
    ):
        self.model, self.dtype = model, dtype
        self.module = module_of(model)
        self.replica = Replica(model)
        self.compiles = compile is not False
        self.compile_options = compile if isinstance(compile, dict) else {}
        # Inductor then captures graphs of its own, which ours cannot hold.
        self.captures = self.compile_options.get("mode") in ("reduce-overhead", "max-autotune")
        self.asked_channels_last = channels_last
        self.weights = Weights(dtype)
        self.programs = Programs(executor, exact, dtype, self.compiles)
        self.lock = self.replica.lock
        self.running = self.watched = 0  # calls
        self.timesteps: Sequence[float] = ()  # of the last of them
        self.depths: list[int] = []  # at which they cut the U-Net
        self._made_for: Any = None
        self._make_callable()

    def __reduce__(self) -> tuple[Any, ...]:
        compile = self.compile_options if self.compiles else False
        given = (self.model, self.dtype, self.asked_channels_last, compile)
        return Network, (*given, self.programs.executor, self.programs.exact)

    def __call__(
        self,
        x: Tensor,
        timesteps: Tensor,
        kwargs: Mapping[str, Any],
        features: Features | None = None,
    ) -> Tensor:
        """The output, (N, C or 2C, ...), for x (N, C, ...) and float32 (N,) timesteps;
        ``features``: what is reused of its U-Net."""
        parameter = first_parameter(self.module)
        plain = self.dtype in (None, torch.float32)
        if plain and parameter is not None and parameter.dtype != x.dtype:
            x = x.to(parameter.dtype)
        reused = nullcontext() if features is None else features.reused()
        with self.autocast(x.device), reused:
            output = self._run(x, timesteps, kwargs)
        if self.watched:
            with self.lock:
                self.replica.write_back()
        return tensor_of(output)

    def _run(self, x: Tensor, timesteps: Tensor, kwargs: Mapping[str, Any]) -> Any:
        if not self.compiles:
            return self.replica(x, timesteps, **kwargs)
        if not self.replica.trusted:  # nobody sees where compiled code leads: once as it is
            self.replica(x, timesteps, **kwargs)
            self._make_callable()
        with eval_mode(self.replica.left):
            return self.call(x, timesteps, **kwargs)

    def attributes(self) -> tuple[Any, ...]:
        """The values of the modules' Python attributes, to be compared with ``==``."""
        with self.lock:
            self.replica.write_back()
            return tuple(attributes_of(original) for original, _ in self.replica.parts())

    def signature(self) -> tuple[Any, ...]:
        """What a captured step rests on beside the attributes."""
        with self.lock:
            return signature(self.replica)

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
    def sampling(
        self, watched: bool = True, timesteps: Sequence[float] = (), depth: int = 0
    ) -> Iterator[None]:
        """To be called inside: the model as it is when the call begins, in eval mode. ``watched``:
        what its forward writes to its attributes somebody may look at before the call is over;
        ``timesteps``: at which it will be called; ``depth``: at which its U-Net is cut in two."""
        depths = [depth] if depth else []
        with self.lock:
            self.timesteps = timesteps
            self.follow()
            self._refresh_weights(depths)
            self.depths += depths
            self.running += 1
            self.watched += watched
        try:
            with self.replica.run():
                yield
        finally:
            with self.lock:
                self.running -= 1
                self.watched -= watched
                for ended in depths:
                    self.depths.remove(ended)
                if not self.running:
                    self.replica.forget()
                    self._end()

    def follow(self) -> None:
        """See what was done to the model since the call began, but for the values of weights of
        which there are copies."""
        with self.lock:
            self.replica.write_back()
            self.replica.refresh()
            self._make_callable()
            if self.running and not self.programs.follow(self.replica):
                self._refresh_weights()

    def _make_callable(self) -> None:
        """``call``, compiled anew where the replica has become another one."""
        made_for = self.replica.call
        if self._made_for is made_for:
            return
        self._made_for = self.call = made_for
        if self.compiles:
            self.call = torch.compile(made_for, **self.compile_options)

    def _refresh_weights(self, depths: Sequence[int] = ()) -> None:
        """``depths``: of a call that begins."""
        twins = self.replica.modules()
        low = self.weights.low
        programs = self.programs.of(self.replica, self.timesteps, [*self.depths, *depths])
        # A program reads the weights of its parts themselves.
        parts = {part for twin in programs for part in twin.original.modules()}
        alone = [] if self.compiles else [t for t in twins if t.original not in parts]
        forwards: dict[Twin, Forward | None] = {twin: forward_of(twin, low) for twin in alone}
        forwards |= programs
        # Read when it is packed, and not at every call.
        kept = {t.original.weight for t, f in forwards.items() if isinstance(f, PackedConvolution)}
        laid_out: set[nn.Module] = set()
        if self.asked_channels_last and self.module is not None:
            laid_out.update(plain_convolutions(self.module))
        # A call in inference mode must not leave tensors that others cannot update.
        with torch.inference_mode(False), torch.no_grad():
            for twin in twins:
                own = twin.original in parts
                last = twin.original in laid_out
                copies = {} if own else self.weights.copies(twin, kept, last)
                twin.put(copies, forwards.get(twin))
                if twin.forward is not None:
                    twin.forward.begin()

    def _end(self) -> None:
        for twin in self.replica.modules():
            if twin.forward is not None:
                twin.forward.end()


def forward_of(twin: Twin, low: torch.dtype | None) -> Forward | None:
    """What runs in place of a module's own forward under autocast of ``low``: that of before, or a
    new one; None where its own does."""
    kept = twin.forward
    if packable(twin.original, low):
        return kept if type(kept) is PackedConvolution else PackedConvolution(twin.twin, low)
    if paddable(twin.original, low):
        return kept if type(kept) is PaddedConvolution else PaddedConvolution(twin.twin)
    return None


def module_of(model: Any) -> nn.Module | None:
    """The model as a module: itself, or what it calls. Of a function the modules are looked for in
    the object it is a method of, its closure, the globals it names, and what a partial binds."""
    found = list(dict.fromkeys(modules_in(model)))
    if len(found) > 1:
        return nn.ModuleList(found)
    return found[0] if found else None


def first_parameter(module: nn.Module | None) -> Tensor | None:
    parameters = iter(()) if module is None else module.parameters()
    return next((p for p in parameters if p.is_floating_point()), None)

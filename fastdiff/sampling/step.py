"""One sampling step: the network, the fused update, and what else was asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError, TrainingError
from fastdiff.methods.table import Index, StepTable
from fastdiff.process.update import Guidance, Update
from fastdiff.sampling.conditions import Conditions
from fastdiff.sampling.network.execution import Features
from fastdiff.sampling.network.network import Network
from fastdiff.sampling.reuse import WHOLE, Extent
from fastdiff.sampling.stats import Stats


@dataclass
class State:
    """Where a call is, all (N, C, ...): x, the x_0 that the row before predicted (None before the
    first) and what the method's rows keep for later ones. And what the network's rows keep:
    ``features``, of its deep layers, and ``difference``, of guidance's outputs; none before the
    first."""

    x: Tensor
    x_start: Tensor | None
    memory: tuple[Tensor, ...]
    features: tuple[Tensor, ...] = ()
    difference: tuple[Tensor, ...] = ()

    @classmethod
    def beginning(cls, x: Tensor, table: StepTable) -> "State":
        return cls(x, None, tuple(torch.zeros_like(x) for _ in range(table.slots)))

    def take(self, other: "State") -> None:
        """Another's values, in the tensors that this one has."""
        assert self.x_start is not None
        self.x.copy_(other.x)
        if other.x_start is None:
            self.x_start.zero_()
        else:
            self.x_start.copy_(other.x_start)
        _copy(self.memory, other.memory)
        self.features = _taken(self.features, other.features)
        self.difference = _taken(self.difference, other.difference)

    def anew(self) -> "State":
        """Without what the network's rows keep, which is of another batch."""
        return replace(self, features=(), difference=())

    def copy(self) -> "State":
        """Tensors that nothing writes over."""
        x_start = None if self.x_start is None else self.x_start.clone()
        kept = (self.memory, self.features, self.difference)
        return State(self.x.clone(), x_start, *(tuple(map(torch.clone, each)) for each in kept))


@dataclass
class Run:
    """What a call's steps are made of; every tensor is on the sampling device.

    ``kwargs``: of the network, for the batch of N; ``doubled``: for the 2N of guidance without a
    ``guide``, which is run beside it with ``guide_kwargs``; ``cond_kwargs``: of the classifier.
    ``timesteps``: (K,) numbers. ``extents``: how much of the network each of its rows runs;
    ``depth``: at which the network is cut for that, or 0. ``failed``: an int64 element, −1 or the
    first row whose x is not finite; None on the CPU, where x is looked at itself.
    ``mean_is_output``: the update reads the network's output in place of x_0 (DDPM by previous-x
    prediction). ``self_condition``: the keyword argument that is the x_0 of the row before.
    """

    network: Network
    table: StepTable
    timesteps: list[float]
    kwargs: Mapping[str, Any]
    cond_kwargs: Mapping[str, Any]
    noise: Any
    conditions: Conditions
    stats: Stats
    guidance_scale: float | Tensor | None = None
    guidance_rescale: float = 0.0
    doubled: Mapping[str, Any] = field(default_factory=dict)
    guide: Network | None = None
    guide_kwargs: Mapping[str, Any] = field(default_factory=dict)
    extents: Mapping[int, Extent] = field(default_factory=dict)
    depth: int = 0
    failed: Tensor | None = None
    mean_is_output: bool = False
    self_condition: str | None = None

    def __post_init__(self) -> None:
        self.update = Update(self.table, self.conditions.x_start, self.mean_is_output)

    @property
    def networks(self) -> list[Network]:
        return [self.network] if self.guide is None else [self.network, self.guide]

    @property
    def given(self) -> list[Mapping[str, Any]]:
        """The networks' keyword arguments."""
        return [self.kwargs, self.doubled, self.guide_kwargs]

    def signature(self) -> list[Any]:
        """What a captured step rests on beside the networks' attributes."""
        return [network.signature() for network in self.networks]

    def advance(self, state: State, i: Index, extent: Extent) -> tuple[Tensor, Tensor]:
        """(x_{t−1}, predicted x_0) of row i; the state's memory is written in place, and what the
        network's rows keep is exchanged.

        ``i`` is a number, or a tensor that is read where it is: nothing then depends on the row but
        through tensors.
        """
        timesteps = self.table.at("timesteps", i)
        with self.stats.phase("network"):
            output, unconditional = self.run_networks(state, timesteps, i, extent)
        with self.stats.phase("update"):
            x_prev, x_start = self.apply(state, output, unconditional, timesteps, i)
        if self.failed is not None:
            bad = ~torch.isfinite(x_prev).all() & (self.failed < 0)
            self.failed.copy_(torch.where(bad, i, self.failed))
        return x_prev, x_start

    def run_networks(
        self, state: State, timesteps: Tensor, i: Index, extent: Extent = WHOLE
    ) -> tuple[Tensor, Tensor | None]:
        """What the network answers for row i, (N, ...), and for guidance the unconditional answer;
        or both as the halves of (2N, ...), and None."""
        x, before = state.x, state.x_start
        if self.table.scales_input:
            x = x * self.table.at("input_scale", i)
        if self.self_condition is not None and before is None:
            before = torch.zeros_like(x)
        if self.guidance_scale is None:
            return self._run_cut(state, self.kwargs, x, before, timesteps, i, extent), None
        keeps = not all(row.both for row in self.extents.values())
        if self.guide is None and extent.both:
            twice = None if before is None else torch.cat([before, before])
            given = (torch.cat([x, x]), twice, timesteps, i)
            output = self._run_cut(state, self.doubled, *given, extent)
            if keeps:
                state.difference = (output[: len(x)] - output[len(x) :],)
            return output, None
        output = self._run_cut(state, self.kwargs, x, before, timesteps, i, extent)
        if not extent.both or self.guide is None:
            (difference,) = state.difference
            return output, output[:, : difference.shape[1]] - difference
        unconditional = self._run(self.guide, self.guide_kwargs, x, before, timesteps, i)
        if keeps:
            # A guide need not predict a variance where the network does.
            state.difference = (output[:, : unconditional.shape[1]] - unconditional,)
        return output, unconditional

    def _run_cut(
        self,
        state: State,
        kwargs: Mapping[str, Any],
        x: Tensor,
        before: Tensor | None,
        timesteps: Tensor,
        i: Index,
        extent: Extent,
    ) -> Tensor:
        """The network's output; its deep features are taken from the state, or put there."""
        if not self.depth:
            return self._run(self.network, kwargs, x, before, timesteps, i)
        kept = () if extent.deep else tuple(part[: len(x)] for part in state.features)
        features = Features(self.depth, kept)
        output = self._run(self.network, kwargs, x, before, timesteps, i, features)
        if extent.deep:
            state.features = _put_first(features.kept, state.features)
        return output

    def _run(
        self,
        network: Network,
        kwargs: Mapping[str, Any],
        x: Tensor,
        before: Tensor | None,
        timesteps: Tensor,
        i: Index,
        features: Features | None = None,
    ) -> Tensor:
        if self.self_condition is not None:
            kwargs = {**kwargs, self.self_condition: before}
        try:
            return self.stats.compiling(network, x, timesteps.expand(len(x)), kwargs, features)
        except Exception as error:
            if not isinstance(error, InputError):
                error.add_note(f"(while fastdiff sampled: step {i}, x of shape {tuple(x.shape)})")
            raise

    def apply(
        self,
        state: State,
        output: Tensor,
        unconditional: Tensor | None,
        timesteps: Tensor,
        i: Index,
    ) -> tuple[Tensor, Tensor]:
        """(x_{t−1}, predicted x_0) of row i from what the networks answered."""
        conditions, x = self.conditions, state.x
        guidance = Guidance(self.guidance_scale, unconditional, self.guidance_rescale)
        noisy = self.table.noisy_rows[i] if isinstance(i, int) else self.table.is_noisy
        if conditions.x_start:  # which reads the output before posterior_step would check it
            guidance.check(x, output, self.table)
        noise = self.noise.of_step(i, noisy)
        x_prev, x_start = self.update(x, output, i, guidance, memory=state.memory, **noise)
        if conditions.classifier is not None:
            given = (x, timesteps.expand(len(x)), self.cond_kwargs)
            x_prev, x_start = conditions.classifier.apply(
                *given, output, i, x_prev, x_start, state.memory
            )
        if conditions.known is not None:
            x_prev = conditions.known.put(x_prev, i, self.noise.of_known(i))
        return x_prev, x_start

    def check_finite(self, x: Tensor, i: int) -> None:
        """TrainingError for samples that are not finite: on a CPU after each row, elsewhere after
        the last, because reading a value would make every step wait for the device."""
        if self.failed is not None:
            i = int(self.failed) if i == len(self.timesteps) - 1 else -1
            finite = i < 0
        else:
            finite = bool(torch.isfinite(x).all())
        if not finite:
            raise TrainingError(
                f"the samples are not finite after step {i} (timestep {self.timesteps[i]:g}): the "
                "network answered NaN or infinity there or before; use an earlier checkpoint, or "
                "another dtype"
            )


def _taken(held: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors that are held, with the values of those that are given, if any."""
    if given and not held:
        return tuple(map(torch.clone, given))
    if given:
        _copy(held, given)
    return held


def _copy(held: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> None:
    for tensor, value in zip(held, given, strict=True):
        if tensor is not value:
            tensor.copy_(value)


def _put_first(new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """New features in place of the first samples' old ones."""
    if not old or len(new[0]) == len(old[0]):
        return new
    return tuple(torch.cat([n, o[len(n) :]]) for n, o in zip(new, old, strict=True))


def failure_flag(device: torch.device) -> Tensor | None:
    """``Run.failed`` of a new call."""
    if device.type == "cpu":
        return None
    return torch.full((1,), -1, dtype=torch.int64, device=device)

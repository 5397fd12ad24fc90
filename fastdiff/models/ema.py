"""Exponential moving averages of a model's parameters, several rates at once."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastdiff.errors import InputError
from fastdiff.models.shards import local, placed
from fastdiff.models.wrappers import plain_name


class EMA:
    """``shadow ← r·shadow + (1 − r)·parameter`` after every optimizer step, for each rate.

    r is the rate, as published; with ``warmup``, which is the default of training runs, it is
    min(rate, (1 + n) / (10 + n)) after n updates. That short memory at first forgets the untrained
    weights, of which a constant rate keeps much for some 3 / (1 − rate) steps.

    A rate is called by its shortest decimal form, ``"0.9999"``; that is its name in checkpoints.
    The averages are float32 whatever the dtype of the parameters: bfloat16 loses a step of 1e-4.
    An update is a few fused launches per rate and waits for nothing.

    Args:
        model: the network whose parameters are followed. The averages start at its present values
            and have the names that the parameters have without wrappers (torch.compile's, DDP's).
        rates: each strictly between 0 and 1; no two alike.
        warmup: whether r grows up to the rate.

    Attributes:
        updates: how often ``update`` was called; whoever restores averages restores it too.

    Raises:
        InputError: a rate out of range or given twice.

    Source: Ho et al. 2020, appendix B (rate 0.9999, constant); the warm-up is TensorFlow's
    ExponentialMovingAverage with num_updates.
    """

    def __init__(
        self, model: nn.Module, rates: Sequence[float] = (0.9999,), *, warmup: bool = False
    ):
        self.warmup = warmup
        self.updates = 0
        # A tied weight has an average under each of its names, as a state_dict has.
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self.names = [plain_name(name) for name in names]
        # Where each parameter hangs: load_state_dict(assign=True) replaces the parameters.
        self._owners = [_owner(model, name) for name in names]
        self.shadows: dict[str, list[Tensor]] = {}
        for rate in rates:
            name = rate_name(rate)
            if name in self.shadows:
                raise InputError(f"EMA: rate {name} was given twice")
            self.shadows[name] = [
                parameter.detach().to(torch.float32, copy=True) for parameter in self.parameters
            ]

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that the followed model has now, in the order of ``names``."""
        return [getattr(module, attribute) for module, attribute in self._owners]

    @property
    def rates(self) -> list[str]:
        """The names of the rates, in the order given."""
        return list(self.shadows)

    @property
    def highest_rate(self) -> str:
        """The slowest average: the one the published systems sample from. InputError for none."""
        if not self.shadows:
            raise InputError("EMA: it was made with no rates, so there is no average")
        return max(self.shadows, key=float)

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters as they are now into every average."""
        sources = [parameter.detach() for parameter in self.parameters]
        if any(source.dtype != torch.float32 for source in sources):
            sources = [source.float() for source in sources]
        for name, shadow in self.shadows.items():
            _lerp(shadow, sources, 1.0 - self._rate_now(name))
        self.updates += 1

    def _rate_now(self, name: str) -> float:
        return min(float(name), _warm(self.updates)) if self.warmup else float(name)

    def state_dict(self, rate: float | str) -> dict[str, Tensor]:
        """The averages of one rate under the parameters' names (float32, not copied).

        Raises:
            InputError: there is no average with that rate.
        """
        return dict(zip(self.names, self._shadow(rate), strict=True))

    @torch.no_grad()
    def load_state_dict(self, rate: float | str, state: Mapping[str, Tensor]) -> None:
        """Put back what ``state_dict`` gave.

        Raises:
            InputError: no such rate; names or shapes in ``state`` that are not this model's.
        """
        shadow = self._shadow(rate)
        if set(state) != set(self.names):
            differing = sorted(set(state) ^ set(self.names))
            raise InputError(
                f"EMA: the state for rate {rate} is of another model; "
                f"{len(differing)} names differ, such as {differing[0]}"
            )
        pairs = list(zip(self.names, shadow, strict=True))
        for name, average in pairs:
            if state[name].shape != average.shape:
                raise InputError(
                    f"EMA: {name} has shape {tuple(state[name].shape)} in the state; "
                    f"the model has {tuple(average.shape)}"
                )
        for name, average in pairs:
            local(average).copy_(local(placed(state[name], average)))

    @torch.no_grad()
    def copy_to(self, model: nn.Module, rate: float | str) -> None:
        """Write one rate's averages into the parameters of ``model``, in place.

        Raises:
            InputError: no such rate, or ``model`` has a parameter of another name or shape; it is
                unchanged.
        """
        state = self.state_dict(rate)
        parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        for name, parameter in parameters.items():
            if name not in state or state[name].shape != parameter.shape:
                raise InputError(f"EMA: the model has a parameter {name} that was not averaged")
        for name, parameter in parameters.items():
            parameter.copy_(state[name])

    @contextmanager
    def swapped(self, rate: float | str | None = None) -> Iterator[None]:
        """Within the block the followed model holds an average (None: the slowest).

        Afterwards it holds what it held before, bit for bit. The values move, not the storage, so
        captured graphs stay valid. They are the model's own: another thread that runs or trains
        it meanwhile sees them too, and what it trains is lost.

        Raises:
            InputError: there is no average with that rate, or none at all.
        """
        shadow = self._shadow(self.highest_rate if rate is None else rate)
        kept = [parameter.detach().clone() for parameter in self.parameters]
        try:
            _copy(self.parameters, shadow)
            yield
        finally:
            _copy(self.parameters, kept)

    def _shadow(self, rate: float | str) -> list[Tensor]:
        name = rate_name(rate)
        if name not in self.shadows:
            raise InputError(
                f"EMA: no average with rate {name}; there are {', '.join(self.shadows)}"
            )
        return self.shadows[name]


def initial_share(rate: float | str, updates: int, *, warmup: bool) -> float:
    """The share of the weights it began with that an average still holds: the product of its r."""
    rate = float(rate)
    if not warmup:
        return rate**updates
    # Below the rate, (1 + k) / (10 + k): their product up to n is n! 9! / (n + 9)!.
    warm = min(updates, math.ceil(max(0.0, (10 * rate - 1) / (1 - rate))))
    return math.exp(math.lgamma(warm + 1) + math.lgamma(10) - math.lgamma(warm + 10)) * rate ** (
        updates - warm
    )


def _warm(updates: int) -> float:
    return (1 + updates) / (10 + updates)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter of that dotted name, and the last part of the name."""
    prefix, _, attribute = name.rpartition(".")
    return model.get_submodule(prefix), attribute


def _lerp(targets: list[Tensor], sources: list[Tensor], weight: float) -> None:
    targets, sources = [local(v) for v in targets], [local(v) for v in sources]
    # A few launches for the whole list; the underscore says that some torch may not have it.
    if hasattr(torch, "_foreach_lerp_"):
        torch._foreach_lerp_(targets, sources, weight)
    else:
        for target, source in zip(targets, sources, strict=True):
            target.lerp_(source, weight)


@torch.no_grad()
def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        local(target).copy_(local(source))


def rate_name(rate: float | str) -> str:
    """``0.9999`` and ``"0.9999"`` -> ``"0.9999"``.

    Raises:
        InputError: not a number strictly between 0 and 1.
    """
    try:
        value = float(rate)
    except ValueError as error:
        raise InputError(f"EMA: rate {rate!r} is not a number") from error
    if not 0.0 < value < 1.0:
        raise InputError(f"EMA: rate {rate!r}; expected 0 < rate < 1")
    return repr(value)

"""Exponential moving averages of a model's parameters, several rates at once."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastdiff.errors import InputError
from fastdiff.models.power_function import exponent, relative_width, share_of_newest
from fastdiff.models.shards import local, placed
from fastdiff.models.wrappers import plain_name

POWER = "power-"  # before sigma_rel in a power function's name
YOUNG = 0.01  # of untrained weights in an average: more than this shows


class EMA:
    """``shadow ← r·shadow + (1 − r)·parameter`` after every optimizer step, for each rate.

    r is the rate, as published; with ``warmup``, which is the default of training runs, it is
    min(rate, (1 + n) / (10 + n)) after n updates. That short memory at first forgets the untrained
    weights, of which a constant rate keeps much for some 3 / (1 − rate) steps.

    Each ``sigma_rel`` is an average of another kind beside them, a power function of time: its
    memory stays that share of the run (fastdiff/models/power_function.py).

    A rate is called by its shortest decimal form, ``"0.9999"``; that is its name in checkpoints. A
    power function is called ``"power-0.05"`` after its sigma_rel, wherever a rate is asked for.
    The averages are float32 whatever the dtype of the parameters: bfloat16 loses a step of 1e-4.
    An update is a few fused launches per rate and waits for nothing.

    Args:
        model: the network whose parameters are followed. The averages start at its present values
            and have the names that the parameters have without wrappers (torch.compile's, DDP's).
        rates: each strictly between 0 and 1; no two alike.
        warmup: whether r grows up to the rate.
        sigma_rel: of power functions, each strictly between 0 and 0.288; no two alike.

    Attributes:
        updates: how often ``update`` was called; whoever restores averages restores it too.

    Raises:
        InputError: a rate or sigma_rel out of range or given twice.

    Source: Ho et al. 2020, appendix B (rate 0.9999, constant); the warm-up is TensorFlow's
    ExponentialMovingAverage with num_updates; power functions: Karras et al. 2024, eq. 127.
    """

    def __init__(
        self,
        model: nn.Module,
        rates: Sequence[float] = (0.9999,),
        *,
        warmup: bool = False,
        sigma_rel: Sequence[float] = (),
    ):
        self.warmup = warmup
        self.updates = 0
        # A tied weight has an average under each of its names, as a state_dict has.
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self.names = [plain_name(name) for name in names]
        # Where each parameter hangs: load_state_dict(assign=True) replaces the parameters.
        self._owners = [_owner(model, name) for name in names]
        self.shadows: dict[str, list[Tensor]] = {}
        for name in [*map(rate_name, rates), *map(power_name, sigma_rel)]:
            if name in self.shadows:
                raise InputError(f"EMA: average {name} was given twice")
            self.shadows[name] = [
                parameter.detach().to(torch.float32, copy=True) for parameter in self.parameters
            ]

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that the followed model has now, in the order of ``names``."""
        return [getattr(module, attribute) for module, attribute in self._owners]

    @property
    def rates(self) -> list[str]:
        """The names of the averages: rates, then power functions, each in the order given."""
        return list(self.shadows)

    @property
    def highest_rate(self) -> str:
        """The rate of the slowest average of those with a rate: the one the published systems
        sample from. InputError for none."""
        rates = [name for name in self.shadows if sigma_rel_of(name) is None]
        if not rates:
            raise InputError("EMA: it was made with no rates, so there is no average")
        return max(rates, key=float)

    @property
    def best_suited(self) -> str | None:
        """The average to sample from now; None where the weights themselves are better."""
        return best_suited(self.rates, self.updates, warmup=self.warmup)

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters as they are now into every average."""
        sources = [parameter.detach() for parameter in self.parameters]
        if any(source.dtype != torch.float32 for source in sources):
            sources = [source.float() for source in sources]
        for name, shadow in self.shadows.items():
            _lerp(shadow, sources, self._share_of_newest(name))
        self.updates += 1

    def _share_of_newest(self, name: str) -> float:
        sigma_rel = sigma_rel_of(name)
        if sigma_rel is not None:
            return share_of_newest(exponent(sigma_rel), self.updates + 1)
        return 1.0 - (min(float(name), _warm(self.updates)) if self.warmup else float(name))

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
        """Within the block the followed model holds an average (None: that of the highest rate).

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
        name = average_name(rate)
        if name not in self.shadows:
            raise InputError(f"EMA: no average {name}; there are {', '.join(self.shadows)}")
        return self.shadows[name]


def initial_share(rate: float | str, updates: int, *, warmup: bool) -> float:
    """The share of the weights it began with that an average still holds: the product of its r."""
    if sigma_rel_of(rate) is not None:
        return 0.0 if updates else 1.0
    rate = float(rate)
    if not warmup:
        return rate**updates
    # Below the rate, (1 + k) / (10 + k): their product up to n is n! 9! / (n + 9)!.
    warm = min(updates, math.ceil(max(0.0, (10 * rate - 1) / (1 - rate))))
    return math.exp(math.lgamma(warm + 1) + math.lgamma(10) - math.lgamma(warm + 10)) * rate ** (
        updates - warm
    )


def best_suited(names: Sequence[str], updates: int | None, *, warmup: bool) -> str | None:
    """The slowest of the averages that hold next to nothing of the untrained weights, None for no
    such. ``updates``: how often they were updated; None where nobody knows: then all are old."""

    def is_old(name: str) -> bool:
        return updates is None or initial_share(name, updates, warmup=warmup) <= YOUNG

    def slowness(name: str) -> tuple[float, float]:
        """(standard deviation of its memory in steps, what decides between two alike)."""
        sigma_rel = sigma_rel_of(name)
        if sigma_rel is not None:
            return sigma_rel * (updates or 0), sigma_rel
        steps = 1 / (1 - float(name))
        # (1 + n) / (10 + n) is the beta of a power function of exponent 8, but for a few steps.
        growing = relative_width(8) * updates if warmup and updates is not None else math.inf
        return min(steps, growing), float(name)

    return max(filter(is_old, names), key=slowness, default=None)


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


def average_name(rate: float | str) -> str:
    """The name of an average: a rate's or a power function's. InputError for what is neither."""
    sigma_rel = sigma_rel_of(rate)
    return rate_name(rate) if sigma_rel is None else power_name(sigma_rel)


def power_name(sigma_rel: float) -> str:
    """0.05 -> ``"power-0.05"``. InputError for a sigma_rel out of range."""
    exponent(sigma_rel)
    return f"{POWER}{float(sigma_rel)!r}"


def sigma_rel_of(name: float | str) -> float | None:
    """``"power-0.05"`` -> 0.05; None for the name of a rate.

    Raises:
        InputError: no number stands there.
    """
    if not isinstance(name, str) or not name.startswith(POWER):
        return None
    try:
        return float(name.removeprefix(POWER))
    except ValueError as error:
        raise InputError(f"EMA: {name!r} is no power function, such as {POWER}0.05") from error


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

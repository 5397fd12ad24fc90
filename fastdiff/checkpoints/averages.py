"""Which of a checkpoint's averages suits, and how much of the weights that its run began with one
still holds.

An average with a constant rate is full of them for some 3 / (1 - rate) steps, and samples of it are
noise.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fastdiff.models.ema import YOUNG, best_suited, initial_share


class Averaged(Protocol):
    """A Checkpoint, which stands above."""

    config: dict[str, Any]
    weights: str
    ema_rates: list[str]


def suited_weights(config: Mapping[str, Any], names: Sequence[str]) -> str:
    """What to sample from: the slowest of the averages ``names`` that has forgotten the weights
    that its run began with, else ``"model"``. ``config``: the checkpoint's config.json."""
    return best_suited(names, _updates(config), warmup=_warms_up(config)) or "model"


def passed_over(checkpoint: Averaged) -> str | None:
    """What to say of the averages that do not suit yet; None where all do."""
    shares = {rate: start_share(checkpoint.config, rate) for rate in checkpoint.ema_rates}
    young = [f"EMA {rate} ({100 * share:.3g} %)" for rate, share in shares.items() if share > YOUNG]
    if not young:
        return None
    return f"not taken, as they still hold untrained weights: {', '.join(young)}"


def young_average(checkpoint: Averaged, instead: str) -> str | None:
    """What to warn of, where the weights that were loaded are an average too young to be used.

    instead: the flag that takes the weights themselves.
    """
    share = start_share(checkpoint.config, checkpoint.weights)
    if share <= YOUNG:
        return None
    warm = "" if _warms_up(checkpoint.config) else ", or an average that warms up (train's default)"
    return (
        f"EMA {checkpoint.weights} is too young: after {_updates(checkpoint.config)} steps it "
        f"still holds {100 * share:.3g} % of the weights that its run began with; take {instead} "
        f"or a lower rate{warm}"
    )


def start_share(config: Mapping[str, Any], weights: str) -> float:
    """How much of the weights that its run began with is in an average of a checkpoint, 0 … 1.

    0 for ``"model"``, which is none, and for averages of which nobody knows how often they were
    updated. Older checkpoints say nothing of averages, and theirs had constant rates.
    """
    updates = _updates(config)
    if weights == "model" or updates is None:
        return 0.0
    return initial_share(weights, updates, warmup=_warms_up(config))


def _warms_up(config: Mapping[str, Any]) -> bool:
    return bool((config.get("averages") or {}).get("warmup", False))


def _updates(config: Mapping[str, Any]) -> int | None:
    """How often the averages were updated. Those that were converted, or saved with averages made
    elsewhere, count none and know no step before which they had none."""
    facts, step = config.get("averages"), config.get("step")
    updates = facts.get("updates") if isinstance(facts, dict) else step
    if updates == 0 and step != 0:
        return None
    return updates if isinstance(updates, int) else None

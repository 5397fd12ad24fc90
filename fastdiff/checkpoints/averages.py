"""How much of the weights that its run began with an average still holds.

An average with a constant rate is full of them for some 3 / (1 - rate) steps, and samples of it are
noise.
"""

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.models.ema import initial_share

YOUNG = 0.01  # of untrained weights in an average: more than this shows


def young_average(checkpoint: Checkpoint, instead: str) -> str | None:
    """What to warn of, where the weights that were loaded are an average too young to be used.

    instead: the flag that takes the weights themselves.
    """
    share = start_share(checkpoint)
    if share <= YOUNG:
        return None
    warm = "" if _warms_up(checkpoint) else ", or an average that warms up (train's default)"
    return (
        f"EMA {checkpoint.weights} is too young: after {_updates(checkpoint)} steps it "
        f"still holds {100 * share:.3g} % of the weights that its run began with; take {instead} "
        f"or a lower rate{warm}"
    )


def start_share(checkpoint: Checkpoint) -> float:
    """How much of the weights that its run began with is in the average that was loaded, 0 … 1.

    0 for what is no average or does not tell. Older checkpoints say nothing of averages, and
    theirs had constant rates.
    """
    if checkpoint.weights == "model":
        return 0.0
    updates = _updates(checkpoint)
    if updates is None:
        return 0.0
    return initial_share(checkpoint.weights, updates, warmup=_warms_up(checkpoint))


def _warms_up(checkpoint: Checkpoint) -> bool:
    return bool((checkpoint.config.get("averages") or {}).get("warmup", False))


def _updates(checkpoint: Checkpoint) -> int | None:
    """How often the averages were updated. Those that were converted, or saved with averages made
    elsewhere, count none and know no step before which they had none."""
    facts = checkpoint.config.get("averages")
    updates = facts.get("updates") if isinstance(facts, dict) else checkpoint.step
    if updates == 0 and checkpoint.step != 0:
        return None
    return updates if isinstance(updates, int) else None

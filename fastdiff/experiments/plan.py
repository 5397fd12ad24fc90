"""An experiment as stages, and what they will take, before any is begun."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fastdiff.experiments.rates import Rate


@dataclass(frozen=True)
class Stage:
    """One command of fastdiff.

    Attributes:
        name: in the plan, and in the record of what is done.
        words: the command's name and its arguments.
        kind: what its passes are: "training", "sampling", "scoring" or "features".
        network: whose they are: a key of the rates.
        passes: of one image through the network.
        disk: bytes that it leaves.
    """

    name: str
    words: tuple[str, ...]
    kind: str
    network: str
    passes: int
    disk: int = 0


Rates = Mapping[tuple[str, str], Rate]  # (network, kind)


def plan_text(
    stages: Sequence[Stage], done: Collection[str], rates: Rates, *, most: int, machine: str
) -> str:
    """The stages with their operations, times and disk, for a terminal.

    rates: of what is still to do. most: the largest number of machines in the table. machine: what
    the rates were measured on, in words.
    """
    counts = [2**power for power in range(most.bit_length()) if 2**power <= most]
    counts = sorted({*counts, most})
    left = [stage for stage in stages if stage.name not in done]
    name = max(len("stage"), *(len(stage.name) for stage in stages))
    head = f"{'stage':{name}}  {'TFLOP':>9}  {'TFLOP/s':>8}  {'disk':>9}"
    lines = [head + "".join(f"{f'on {count}':>9}" for count in counts)]
    for stage in stages:
        if stage.name in done:
            lines.append(f"{stage.name:{name}}  done")
            continue
        rate = rates[stage.network, stage.kind]
        row = _row(stage.passes * rate.flops, f"{rate.flops / rate.seconds / 1e12:8.3g}")
        times = _times(planned_seconds([stage], rates), counts)
        lines.append(f"{stage.name:{name}}{row}{_disk(stage.disk)}{times}")
    total = sum(stage.passes * rates[stage.network, stage.kind].flops for stage in left)
    seconds = _times(planned_seconds(left, rates), counts)
    sums = _row(total, " " * 8) + _disk(sum(stage.disk for stage in left))
    lines.append(f"{'left to do':{name}}{sums}{seconds}")
    lines.append(
        f"rates measured on {machine}; N of its kind take an N-th of the time: what they tell each "
        "other, the reading of data and each command's start are not counted"
    )
    return "\n".join(lines)


def planned_seconds(stages: Sequence[Stage], rates: Rates) -> float:
    """Of all of the stages, on what the rates were measured on."""
    return sum(stage.passes * rates[stage.network, stage.kind].seconds for stage in stages)


def _times(seconds: float, counts: Sequence[int]) -> str:
    """On each of so many machines."""
    return "".join(f"{duration(seconds / count):>9}" for count in counts)


def _row(flops: int, rate: str) -> str:
    return f"  {flops / 1e12:9.3g}  {rate}"


def _disk(size: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"  {size / scale:6.1f} {unit}"
    return f"  {size / 1e3:6.1f} kB"


def duration(seconds: float) -> str:
    """In the largest unit of which there is one at least."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"

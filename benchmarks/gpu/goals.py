"""What is wanted of an H100 or H200, and which measurements reach it."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness import summary

Row = dict[str, Any]
Verdict = tuple[str, str | None, str | None, str]  # goal, case, measured, met
OURS = "fastdiff bfloat16"
NOT_BACKENDS = ("copy", "sdpa")  # contenders of the phase operations
CASE = ("op", "direction", "shape", "dtype", "layout")
BENCHED = ("op", "variant", "shape", "batch", "dtype", "layout", "direction")


@dataclass(frozen=True)
class SamplerGoal:
    """``least`` times faster than ``rival`` (None: than each) at ``batch``."""

    name: str
    least: float
    rival: str | None
    batch: int


SAMPLER_GOALS = {  # by phase
    "eager": SamplerGoal("sampler, 5x eager diffusers at batch 1", 5.0, "diffusers float32", 1),
    "compiled": SamplerGoal("sampler, 1.3x compiled at batch 64", 1.3, None, 64),
}
SDPA_TARGETS = (summary.sdpa_target(512), summary.sdpa_target(256))


@dataclass(frozen=True)
class Measured:
    """An operation on one case by the fastest of its backends. ``faster``: how many times faster
    than a peer; ``targets``: how many it should be."""

    op: str
    direction: str
    case: str
    percent: float | None  # of a copy's rate, or of the floor
    judged: bool  # by that: less is bound by its launch
    faster: dict[str, float] = field(default_factory=dict)
    targets: dict[str, float] = field(default_factory=dict)


def goals(rows: Sequence[Row]) -> Iterator[Verdict]:
    found = [*sampler(rows), *operations([*alone(rows), *benched(rows)])]
    yield from found
    reached = {name for name, *_ in found}
    for name in expected():
        if name not in reached:
            yield name, None, None, "not measured"


def expected() -> Iterator[str]:
    yield from (goal.name for goal in SAMPLER_GOALS.values())
    yield from (of_copy(*key) for key in summary.GPU_SHARES)
    for direction in ("forward", "forward+backward"):
        yield from (of_sdpa("attention", direction, least) for least in SDPA_TARGETS)


def of_copy(op: str, direction: str) -> str:
    return f"{op} {direction}, {summary.GPU_SHARES[op, direction]} % of a copy"


def of_sdpa(op: str, direction: str, least: float) -> str:
    return f"{op} {direction}, {least:g}x PyTorch's"


def verdict(name: str, case: str, value: float, least: float, unit: str) -> Verdict:
    return name, case, f"{value:.3g}{unit}", "met" if value >= least else "missed"


def sampler(rows: Iterable[Row]) -> Iterator[Verdict]:
    """Each against the peers of its own phase."""
    kept = of_kind(rows, "ms_per_step", tuple(SAMPLER_GOALS))
    for (phase, network, batch), members in grouped(kept, "phase", "network", "batch"):
        goal = SAMPLER_GOALS[phase]
        steps = {name: median(of, "ms_per_step") for (name,), of in grouped(members, "contender")}
        if OURS not in steps or not (batch == goal.batch or members[0].get("dry")):
            continue
        for rival in steps:
            if not rival.startswith("fastdiff") and goal.rival in (None, rival):
                case = f"{network}, batch {batch}, over {rival}"
                yield verdict(goal.name, case, steps[rival] / steps[OURS], goal.least, "x")


def operations(measured: Iterable[Measured]) -> Iterator[Verdict]:
    for one in measured:
        least = summary.GPU_SHARES.get((one.op, one.direction))
        if least is not None and one.percent is not None and one.judged:
            yield verdict(of_copy(one.op, one.direction), one.case, one.percent, least, " %")
        for peer, target in one.targets.items():
            if peer in one.faster:
                name, case = of_sdpa(one.op, one.direction, target), f"{one.case} over {peer}"
                yield verdict(name, case, one.faster[peer], target, "x")


def alone(rows: Iterable[Row]) -> Iterator[Measured]:
    """The phase operations, which has a row of each contender's turn."""
    for key, members in grouped(of_kind(rows, "gbps", ("operations",)), *CASE):
        op, direction, *case = key
        seconds, shares = (
            {name: median(of, figure) for (name,), of in grouped(members, "contender")}
            for figure in ("seconds", "percent_of_copy")
        )
        backends = [name for name in seconds if name not in NOT_BACKENDS]
        if not backends:
            continue
        best = min(backends, key=lambda name: seconds[name])
        yield Measured(
            op,
            direction,
            f"{' '.join(case)}, {best}",
            shares[best],
            is_large(members[0]),
            {name: seconds[name] / seconds[best] for name in seconds},
            members[0].get("targets", {}),
        )


def benched(rows: Iterable[Row]) -> Iterator[Measured]:
    """pytest-benchmark's, which have a row of each case; and the norm's backward, by difference."""
    latest = bench_rows(rows)
    for row in latest:
        best = fastest(row)
        seconds = row["times_s"][best]
        percent = 100 * row["floor_s"] / seconds if row.get("floor_s") else None
        faster = {name: theirs / seconds for name, theirs in row["times_s"].items()}
        if summary.BEST_SDPA in row["times_faster"]:
            faster[summary.BEST_SDPA] = faster[row["best_sdpa"]]
        case = f"{bench_case(row)}, {best}"
        named = row["op"], row["direction"], case, percent, is_large(row)
        yield Measured(*named, faster, row["targets"])
    for row in summary.backward_rows(latest):
        case = f"{bench_case(row)}, by difference"
        yield Measured(row["op"], "backward", case, row["percent_of_floor"], is_large(row))


def bench_rows(rows: Iterable[Row]) -> list[Row]:
    """Of each case the last."""
    kept = of_kind(rows, "times_s")
    return list({tuple(row[name] for name in BENCHED): row for row in kept}.values())


def bench_case(row: Row) -> str:
    return f"{summary.case(row)} {row['dtype']} {row['layout']}"


def fastest(row: Row) -> str:
    """Of a benchmark's row: the plan's choice, or the backend that was faster."""
    ours = [name for name in row["times_s"] if name in (row["ours"], "triton", "cuda")]
    return min(ours, key=lambda name: row["times_s"][name])


def is_large(row: Row) -> bool:
    return row["bytes"] >= summary.LARGE or bool(row.get("dry"))


# What the tables and the goals ask of the rows


def of_kind(rows: Iterable[Row], figure: str, phases: Sequence[str] = ()) -> list[Row]:
    """Those that have the figure, of the named phases or of all."""
    found = [row for row in rows if row.get(figure) is not None]
    return [row for row in found if not phases or row["phase"] in phases]


def grouped(rows: Iterable[Row], *names: str) -> Iterator[tuple[tuple, list[Row]]]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in names), []).append(row)
    yield from found.items()


def median(rows: Iterable[Row], figure: str) -> Any:
    """Over the rounds; None where no row has the figure."""
    values = [row[figure] for row in rows if row.get(figure) is not None]
    return statistics.median(values) if values else None

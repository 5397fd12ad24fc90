"""What the runs have measured, in tables, and which goals are met.

    python -m gpu.report --out FOLDER [--dry] [--budget SECONDS]

Reads FOLDER/rows.jsonl, prints the report and writes it to FOLDER/report.md.
"""

import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gpu import lines

FILE = "report.md"
Row = dict[str, Any]
SAMPLING = ("sampler", "eager", "compiled")  # phases
OURS = "fastdiff bfloat16"
LARGE_BYTES = 64 << 20  # of an operation: less is bound by its launch


@dataclass(frozen=True)
class Goal:
    """``least``: times faster than ``rival`` (None: than each), or % of a copy's rate."""

    name: str
    least: float
    rival: str | None = None
    batch: int | None = None

    def verdict(self, case: str, value: float) -> tuple[str, str, str, str]:
        met = "met" if value >= self.least else "missed"
        return self.name, case, f"{value:.3g}{' %' if self.rival == 'copy' else 'x'}", met


SAMPLER_GOALS = {  # by phase
    "eager": Goal("sampler, 5x eager diffusers at batch 1", 5.0, "diffusers float32", 1),
    "compiled": Goal("sampler, 1.3x compiled at batch 64", 1.3, None, 64),
}
OPERATION_GOALS = {
    "group_norm_silu": Goal("norms, 85 % of a copy", 85.0, "copy"),
    "q_sample": Goal("q_sample, 90 % of a copy", 90.0, "copy"),
    "posterior_step": Goal("posterior_step, 90 % of a copy", 90.0, "copy"),
    "attention": Goal("attention, 1.5x PyTorch's", 1.5, "sdpa"),
}


def main(argv: Sequence[str] | None = None) -> int:
    given = lines.arguments(__doc__, argv)
    text = report(lines.read(given.out))
    print(text)
    (given.out / FILE).write_text(text + "\n", encoding="utf-8")
    return 0


def report(rows: list[Row]) -> str:
    """Of a folder in which several runs wrote, the measurements of all."""
    if not rows:
        return "# GPU runs\n\nNothing was measured."
    last = rows[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    dry = any(row.get("dry") for row in rows)
    parts = [
        "# GPU runs",
        f"{last['device']}, {versions}." + (" A dry run: no measurement of a GPU." if dry else ""),
        section("Goals", ("goal", "case", "measured", "met"), goals(rows)),
        section(
            "Sampling",
            ("network", "batch", "contender", "norms", "ms/step", "% of matmul", "PSNR dB"),
            sampling(rows),
        ),
        section(
            "Operations",
            ("operation", "shape", "dtype", "layout", "contender", "us", "GB/s", "% of copy"),
            operations(rows),
        ),
        section("Profile", ("batch", "kind", "ms/step", "%", "kernels/step"), profile(rows)),
        section("ncu", ("kernel", "DRAM %", "issue %", "occupancy %", "registers"), ncu(rows)),
        section("Compiling", ("contender", "network", "batch", "s"), compiling(rows)),
        section("Not measured", ("phase", "what", "why"), missing(rows)),
    ]
    return "\n\n".join(part for part in parts if part)


def section(title: str, head: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    """A markdown table; "" where it has no rows."""
    written = [f"| {' | '.join(map(cell, row))} |" for row in body]
    if not written:
        return ""
    rule = f"|{'---|' * len(head)}"
    return "\n".join([f"## {title}", "", f"| {' | '.join(head)} |", rule, *written])


def cell(value: Any) -> str:
    if value is None:
        return "–"
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def median(rows: Iterable[Row], figure: str) -> float | None:
    """Over the rounds."""
    values = [row[figure] for row in rows if row.get(figure) is not None]
    return statistics.median(values) if values else None


def grouped(rows: Iterable[Row], *names: str) -> Iterator[tuple[tuple, list[Row]]]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in names), []).append(row)
    yield from found.items()


# The tables


def sampling(rows: list[Row]) -> Iterator[Sequence[Any]]:
    peaks = dict(grouped(of_kind(rows, "matmul_tflops"), "phase"))
    kept = of_kind(rows, "ms_per_step", SAMPLING)
    for key, members in grouped(kept, "network", "batch", "contender", "phase"):
        network, batch, contender, phase = key
        rate, peak = median(members, "tflops"), median(peaks.get((phase,), ()), "matmul_tflops")
        share = 100 * rate / peak if rate and peak else None
        first = members[0]
        step, psnr = median(members, "ms_per_step"), first.get("psnr_db")
        yield network, batch, contender, first.get("norms"), step, share, psnr


def operations(rows: list[Row]) -> Iterator[Sequence[Any]]:
    kept = of_kind(rows, "gbps", ("operations",))
    for key, members in grouped(kept, "op", "shape", "dtype", "layout", "contender"):
        seconds = median(members, "seconds")
        us = None if seconds is None else 1e6 * seconds
        yield *key, us, median(members, "gbps"), median(members, "percent_of_copy")


def profile(rows: list[Row]) -> Iterator[Sequence[Any]]:
    for row in of_kind(rows, "kind", ("profile",)):
        yield row["batch"], row["kind"], row["ms_per_step"], row["percent"], row["calls_per_step"]


def ncu(rows: list[Row]) -> Iterator[Sequence[Any]]:
    figures = ("kernel", "dram_percent", "issue_percent", "occupancy_percent", "registers")
    for row in of_kind(rows, "kernel", ("ncu",)):
        yield [row.get(name) for name in figures]


def compiling(rows: list[Row]) -> Iterator[Sequence[Any]]:
    for row in of_kind(rows, "compile_s"):
        yield row["contender"], row["network"], row["batch"], row["compile_s"]


def missing(rows: list[Row]) -> Iterator[Sequence[Any]]:
    known = ("contender", "network", "op", "shape", "dtype", "layout", "batch", "ceiling")
    for row in rows:
        why = row.get("error") or row.get("skipped")
        if why:
            what = ", ".join(str(row[name]) for name in known if row.get(name) is not None)
            yield row["phase"], what or None, why


def of_kind(rows: list[Row], figure: str, phases: Sequence[str] = ()) -> list[Row]:
    """Those that have the figure, of the named phases or of all."""
    found = [row for row in rows if row.get(figure) is not None]
    return [row for row in found if not phases or row["phase"] in phases]


# The goals


def goals(rows: list[Row]) -> Iterator[Sequence[Any]]:
    found = [*sampler_goals(rows), *operation_goals(rows)]
    yield from found
    for goal in (*SAMPLER_GOALS.values(), *OPERATION_GOALS.values()):
        if not any(name == goal.name for name, *_ in found):
            yield goal.name, None, None, "not measured"


def sampler_goals(rows: list[Row]) -> Iterator[Sequence[Any]]:
    """Each against the peers of its own phase."""
    kept = of_kind(rows, "ms_per_step", tuple(SAMPLER_GOALS))
    for (phase, network, batch), members in grouped(kept, "phase", "network", "batch"):
        goal = SAMPLER_GOALS[phase]
        steps = {name: median(of, "ms_per_step") for (name,), of in grouped(members, "contender")}
        if OURS not in steps or not (batch == goal.batch or members[0].get("dry")):
            continue
        for rival in steps:
            if rival != OURS and goal.rival in (None, rival):
                faster = steps[rival] / steps[OURS]
                yield goal.verdict(f"{network}, batch {batch}, over {rival}", faster)


def operation_goals(rows: list[Row]) -> Iterator[Sequence[Any]]:
    """Of the fastest backend of each case that is large enough."""
    kept = of_kind(rows, "gbps", ("operations",))
    for (op, *case), members in grouped(kept, "op", "shape", "dtype", "layout"):
        goal = OPERATION_GOALS[op]
        shares, seconds = (
            {name: median(of, figure) for (name,), of in grouped(members, "contender")}
            for figure in ("percent_of_copy", "seconds")
        )
        backends = [name for name in shares if name not in ("copy", "sdpa")]
        small = members[0]["bytes"] < LARGE_BYTES and not members[0].get("dry")
        if not backends or (small and goal.rival == "copy"):
            continue
        best = min(backends, key=lambda name: seconds[name])
        if goal.rival == "copy":
            yield goal.verdict(f"{' '.join(case)}, {best}", shares[best])
        elif goal.rival in seconds:
            faster = seconds[goal.rival] / seconds[best]
            yield goal.verdict(f"{' '.join(case)}, {best} over {goal.rival}", faster)


if __name__ == "__main__":
    sys.exit(main())

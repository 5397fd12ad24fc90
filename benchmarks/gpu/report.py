"""What the runs have measured, in tables, and which goals are met.

    python -m gpu.report --out FOLDER [--dry] [--budget SECONDS]

Reads FOLDER/rows.jsonl, prints the report and writes it to FOLDER/report.md.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gpu import lines
from gpu.goals import CASE, Row, bench_case, bench_rows, goals, grouped, median, of_kind

FILE = "report.md"
SAMPLING = ("sampler", "eager", "compiled")  # phases
WHOLE = "the phase"


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
            "Training", ("network", "batch", "contender", "ms/step", "images/s"), training(rows)
        ),
        section("Operations", (*CASE, "contender", "us", "GB/s", "% of copy"), operations(rows)),
        section(
            "Benchmarks",
            ("op", "direction", "case", "by", "ms", "GB/s", "% of floor", "times faster than"),
            benchmarks(rows),
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


def training(rows: list[Row]) -> Iterator[Sequence[Any]]:
    for key, members in grouped(of_kind(rows, "step_ms"), "network", "batch", "contender"):
        yield *key, median(members, "step_ms"), median(members, "images_per_s")


def operations(rows: list[Row]) -> Iterator[Sequence[Any]]:
    kept = of_kind(rows, "gbps", ("operations",))
    for key, members in grouped(kept, *CASE, "contender"):
        seconds = median(members, "seconds")
        us = None if seconds is None else 1e6 * seconds
        yield *key, us, median(members, "gbps"), median(members, "percent_of_copy")


def benchmarks(rows: list[Row]) -> Iterator[Sequence[Any]]:
    """Ours is what the plan chose; other backends are among the peers."""
    for row in bench_rows(rows):
        figures = 1e3 * row["times_s"][row["ours"]], row.get("gbps"), row.get("percent_of_floor")
        peers = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row["times_faster"].items())
        yield row["op"], row["direction"], bench_case(row), row["ours"], *figures, peers


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
    """What was skipped, raised or was wrong, what was planned and never begun, and phases that did
    not end well; in a folder of several runs what the last one says."""
    found: dict[tuple[str, str | None], str] = {}
    for row in rows:
        phase, why_not = row["phase"], reason(row)
        if "outcome" in row:
            found[phase, WHOLE] = row["outcome"]
        elif why_not:
            found[phase, named(row)] = why_not
        else:
            found.pop((phase, named(row)), None)
        for peer, said in row.get("missing", {}).items():
            found[phase, f"{row['op']} by {peer}"] = said
        for case in row.get("planned", ()):
            if not any(case.items() <= other.items() for other in of_phase(rows, phase)):
                found[phase, named(case)] = "not done when the phase ended"
    for (phase, what), why in found.items():
        if what != WHOLE or not why.startswith("ok"):
            yield phase, what, why


def reason(row: Row) -> str | None:
    """Why a row is none of a measurement."""
    if row.get("skipped"):
        return row["skipped"]
    error = row.get("error")
    if isinstance(error, float):  # a number's, which may be allowed
        return None if row["ok"] else f"off by {error:.3g}, {row['allowed']:.3g} is allowed"
    return error


def named(row: Row) -> str | None:
    known = ("contender", "network", *CASE, "backend", "batch", "ceiling")
    return ", ".join(str(row[name]) for name in known if row.get(name) is not None) or None


def of_phase(rows: list[Row], phase: str) -> list[Row]:
    return [row for row in rows if row["phase"] == phase]


if __name__ == "__main__":
    sys.exit(main())

"""What holds five kernels up, by NVIDIA's profiler: DRAM %, issue %, occupancy.

    python -m gpu.ncu --out FOLDER [--dry] [--budget SECONDS]

Writes FOLDER/ncu.csv, and a row in rows.jsonl for each kernel. Where there is no ncu, or it may not
read the counters, a row says so. A dry run launches the kernels without it, and reads a report of
the same form.
"""

import csv
import io
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpu.machine import program
from gpu.phase import Phase

FILE = "ncu.csv"
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "Occupancy", "LaunchStats")
# Of a report's metrics, by the name in our rows.
METRICS = {
    "Duration": "duration",
    "DRAM Throughput": "dram_percent",
    "Issue Slots Busy": "issue_percent",
    "Achieved Occupancy": "occupancy_percent",
    "Registers Per Thread": "registers",
}
COLUMNS = ("ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value")
STAND_IN = "\n".join(
    [
        "==PROF== Connected to process 1",
        ",".join(f'"{name}"' for name in COLUMNS),
        '"0","norm_kernel","DRAM Throughput","%","81.5"',
        '"0","norm_kernel","Duration","ns","1,024.00"',
        '"0","norm_kernel","L2 Hit Rate","%","3.1"',
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    phase = Phase.begin("ncu", __doc__, argv)
    ncu = program("ncu")
    if ncu is None and not phase.dry:
        phase.write(skipped="ncu is not on the PATH, nor in CUDA's folder")
        return 0
    with phase.attempt():
        report = run(phase, [] if phase.dry or ncu is None else command(ncu))
        metrics = list(parse(STAND_IN if phase.dry else report))
        write_file(phase.out / FILE, metrics)
        for kernel in kernels(metrics):
            phase.write(**kernel)
    return phase.ended()


def command(ncu: str) -> list[str]:
    sections = [word for name in SECTIONS for word in ("--section", name)]
    # The machine's clocks are not ours to lock.
    how = ["--csv", "--profile-from-start", "off", "--print-kernel-base", "function"]
    how += ["--clock-control", "none"]
    return [ncu, *how, *sections]


def run(phase: Phase, watcher: list[str]) -> str:
    """What ncu prints of the launches. Raises RuntimeError with its own words where it fails."""
    launches = [sys.executable, "-m", "gpu.watched", "--out", str(phase.out)]
    limit = max(phase.deadline - time.monotonic(), 1.0)
    done = subprocess.run(
        [*watcher, *launches, *(["--dry"] if phase.dry else [])],
        capture_output=True,
        text=True,
        timeout=limit,
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("==ERROR==")]
    if done.returncode != 0 or said:
        tail = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise RuntimeError(" ".join(said or tail) or f"exit {done.returncode}")
    return done.stdout


def parse(report: str) -> Iterator[dict[str, str]]:
    """The wanted metrics of ncu's CSV, which stands among its messages."""
    table = "\n".join(line for line in report.splitlines() if line.startswith('"'))
    for row in csv.DictReader(io.StringIO(table)):
        if row["Metric Name"] in METRICS:
            yield {name: row[name] for name in COLUMNS}


def write_file(path: Path, metrics: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(metrics)


def kernels(metrics: list[dict[str, str]]) -> list[dict[str, str | float]]:
    """One row of each launch."""
    found: dict[str, dict[str, str | float]] = {}
    for metric in metrics:
        row = found.setdefault(metric["ID"], {"kernel": metric["Kernel Name"]})
        name = METRICS[metric["Metric Name"]]
        row[name] = float(metric["Metric Value"].replace(",", ""))
        if name == "duration":
            row["unit"] = metric["Metric Unit"]
    return list(found.values())


if __name__ == "__main__":
    sys.exit(main())

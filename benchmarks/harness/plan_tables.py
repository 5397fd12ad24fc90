"""Tables that an operation's plan rests on: rows of shapes, with the time of every implementation.

One table for a machine and a number of threads, in a folder of benchmarks/results. A second run on
the same day betters the rows of the first: the best counts, since other processes only add, and for
minutes on end.
"""

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import fastdiff
from fastdiff.ops import native
from fastdiff.ops.attention.op import cpu
from harness import results

Step = Callable[[], Any]


def measure_table(
    folder: str, cases: Iterable[dict], steps: Callable[[dict], dict[str, Step]], doc: str | None
) -> None:
    """The command: race ``steps(case)`` for every case, and write what was found."""
    parser = argparse.ArgumentParser(description=doc)
    path = results.default_path(torch.device("cpu"))
    parser.add_argument("--out", type=Path, default=path.parent / folder / path.name)
    parser.add_argument("--seconds", type=float, default=0.15, help="per row")
    args = parser.parse_args()
    for row in (rows := _rows_of(args.out, cases)):
        case = {name: value for name, value in row.items() if name != "microseconds"}
        best, found = row["microseconds"], race(steps(case), args.seconds)
        row["microseconds"] = {name: min(best.get(name, v), v) for name, v in found.items()}
        print(*row.values(), flush=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    text = json.dumps(machine(), indent=1)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(f'{{\n"machine": {text},\n"rows": [\n{lines}\n]\n}}\n', encoding="utf-8")


def race(steps: dict[str, Step], seconds: float) -> dict[str, float]:
    """The shortest microseconds of each, turn by turn."""
    best = dict.fromkeys(steps, float("inf"))
    for step in steps.values():
        step()
    end, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or rounds < 7:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            best[name] = min(best[name], time.perf_counter() - start)
        rounds += 1
    return {name: round(1e6 * value, 1) for name, value in best.items()}


def machine() -> dict:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    isa, tiles, amx = cpu()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "isa": isa,
        "tiles": tiles,
        "amx": amx,
        "threads": torch.get_num_threads(),
        "times": "shortest",
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "fastdiff": fastdiff.__version__,
        "compiler": native.build_info()["compiler"],
        "date": datetime.date.today().isoformat(),
    }


def _rows_of(path: Path, cases: Iterable[dict]) -> list[dict]:
    """What an earlier run on this machine and day found, or empty rows."""
    if path.exists():
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["machine"] == machine():
            return table["rows"]
    return [{**case, "microseconds": {}} for case in cases]

"""The results file: which machine, when, and one row per case.

Rows are plain dictionaries; conftest.race makes them and the fields are described there. A run
replaces the rows it measured again and keeps the others, if they are from the same machine and
versions, so a file can be filled by several runs, and holds what was measured when one is cut.
"""

import datetime
import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from fastdiff.commands import info
from harness.timing import large_copy_gbps, matmul_tflops

FORMAT = "fastdiff benchmarks 1"
FOLDER = Path(__file__).parents[1] / "results"
IDENTITY = ("op", "variant", "shape", "batch", "dtype", "layout", "direction")
SAVE_EVERY_S = 10

Row = dict[str, Any]


def machine(device: torch.device) -> dict[str, Any]:
    """What must agree for two runs' rows to stand in one file."""
    known = info.collect()
    versions = known["versions"]
    return {
        "format": FORMAT,
        "device": device_name(device),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "cpu": known["cpu"]["model"],
        "isa": known["native"].get("isa in use"),
        "driver": _driver() if device.type == "cuda" else None,
        "versions": {n: versions[n] for n in ("fastdiff", "torch", "triton", "python")},
    }


def ceilings(device: torch.device) -> dict[str, Any]:
    """The two rooflines of this machine, measured now."""
    dtypes = (torch.float32, torch.bfloat16)
    return {
        "copy_gbps": large_copy_gbps(device),
        "matmul_tflops": {str(d).removeprefix("torch."): matmul_tflops(device, d) for d in dtypes},
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = info.collect()["cpu"]["model"]
    return f"{model}, {torch.get_num_threads()} threads".replace(" 1 threads", " 1 thread")


def default_path(device: torch.device) -> Path:
    """benchmarks/results/<device>.json"""
    name = re.sub(r"\(.*?\)", "", device_name(device)).lower()
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", name).strip("-") + ".json")


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip().splitlines()[0] if answer.stdout.strip() else None


def load(path: Path) -> dict[str, Any] | None:
    """A results file, or None for what is none (other tables may stand in the same folder)."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and data.get("format") == FORMAT else None


class Results:
    """The rows of this run over those of earlier ones on the same machine."""

    def __init__(self, path: Path | None, header: dict[str, Any]):
        self.path, self.header = path, header
        self.measured: list[Row] = []
        before = load(path) if path is not None else None
        same = before is not None and all(before.get(k) == v for k, v in header.items())
        self.kept: list[Row] = before["rows"] if before is not None and same else []
        self.saved_at = time.monotonic()

    def add(self, row: Row) -> None:
        self.measured.append({**row, "date": today()})
        if time.monotonic() - self.saved_at > SAVE_EVERY_S:
            self.save()

    def rows(self) -> list[Row]:
        """Everything known, sorted; what was measured again replaces what was there."""
        rows = {identity(row): row for row in [*self.kept, *self.measured]}
        return [rows[key] for key in sorted(rows, key=str)]

    def save(self) -> None:
        """Write the file whole or not at all."""
        if self.path is None or not self.measured:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in self.rows())
        header = json.dumps({**self.header, "date": today()}, indent=1).removesuffix("\n}")
        partial = self.path.with_suffix(".partial")
        partial.write_text(f'{header},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
        os.replace(partial, self.path)
        self.saved_at = time.monotonic()


def identity(row: Row) -> tuple:
    return tuple(row[name] for name in IDENTITY)


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()

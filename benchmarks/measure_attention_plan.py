"""Measures what attention's plan rests on: python benchmarks/measure_attention_plan.py

Every implementation of attention on the CPU, turn by turn in one process, over the shapes of the
published U-Nets at batch 1 and 8 and a grid beside them, in both layouts, with and without the
backward. OMP_NUM_THREADS says on how many threads; a second run betters the rows of the first.
Writes benchmarks/results/attention_plan/<device>-<n>-threads.json; tests/ops/test_attention_plan.py
checks that the rule in fastdiff/ops/attention/plan.py picks (nearly) the fastest in every row of
every table.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import fastdiff
from fastdiff.ops import native
from fastdiff.ops.attention.op import cpu, run
from fastdiff.ops.backends import short
from harness import results

PUBLISHED = [  # heads, tokens, head_dim
    *[(1, 256, 256), (1, 16, 256), (1, 256, 512), (1, 64, 512), (4, 256, 64), (4, 64, 64)],
    *[(4, 16, 64), (4, 256, 96), (4, 64, 128), (4, 256, 144), (4, 64, 192), (6, 1024, 64)],
    *[(9, 256, 64), (12, 64, 64)],
]
BESIDE = [(2, 128, 32), (8, 128, 64), (1, 1024, 128), (2, 512, 8), (1, 100, 40), (16, 32, 128)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cases() -> Iterator[dict]:
    for dtype in DTYPES:
        for heads, tokens, head_dim in PUBLISHED + BESIDE:
            for samples in (1, 8):
                if samples * heads * tokens**2 * head_dim > 1 << 29:
                    continue  # ADM-64 at batch 8 is as at batch 1, only longer
                for token_major in (True, False):
                    for training in (False, True):
                        yield {
                            "dtype": short(dtype),
                            "samples": samples,
                            "heads": heads,
                            "tokens": tokens,
                            "head_dim": head_dim,
                            "token_major": token_major,
                            "training": training,
                        }


def measure(case: dict, seconds: float) -> dict[str, float]:
    """The median microseconds of every implementation."""
    dtype = getattr(torch, case["dtype"])
    channels = case["heads"] * case["head_dim"]
    qkv = torch.randn(case["samples"], case["tokens"], 3 * channels).to(dtype).transpose(1, 2)
    grad = torch.randn(case["samples"], case["tokens"], channels).to(dtype).transpose(1, 2)
    if not case["token_major"]:
        qkv = qkv.contiguous()
    qkv.requires_grad_(case["training"])

    def step(implementation: str) -> Callable[[], None]:
        def forward() -> None:
            with torch.no_grad():
                run(implementation, qkv, case["heads"], "heads_first")

        def both() -> None:
            qkv.grad = None
            run(implementation, qkv, case["heads"], "heads_first").backward(grad)

        return both if case["training"] else forward

    names = ["native", "sdpa"]
    if case["training"] and dtype != torch.float32:
        names.append("matmuls")
    return race({name: step(name) for name in names}, seconds)


def race(steps: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["native"]) < 7:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: round(1e6 * statistics.median(values), 1) for name, values in times.items()}


def machine() -> dict:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    isa, amx = cpu()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "isa": isa,
        "amx": amx,
        "threads": torch.get_num_threads(),
        "times": "median",
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "fastdiff": fastdiff.__version__,
        "compiler": native.build_info()["compiler"],
        "date": datetime.date.today().isoformat(),
    }


def rows_of(path: Path) -> list[dict]:
    """What an earlier run on this machine and day found, or empty rows: the best median counts,
    since other processes only add, and for minutes on end."""
    if path.exists():
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["machine"] == machine():
            return table["rows"]
    return [{**case, "microseconds": {}} for case in cases()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    path = results.default_path(torch.device("cpu"))
    path = path.parent / "attention_plan" / path.name
    parser.add_argument("--out", type=Path, default=path)
    parser.add_argument("--seconds", type=float, default=0.15, help="per row")
    args = parser.parse_args()
    rows = rows_of(args.out)
    for row in rows:
        best, found = row["microseconds"], measure(row, args.seconds)
        row["microseconds"] = {name: min(best.get(name, v), v) for name, v in found.items()}
        print(*row.values(), flush=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    text = json.dumps(machine(), indent=1)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(f'{{\n"machine": {text},\n"rows": [\n{lines}\n]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()

"""What training costs: a row for each preset, and what several processes give and take.

    python benchmarks/measure_training.py                                 # all, in twenty minutes
    python benchmarks/measure_training.py --presets digits --ranks digits # of this one alone
    python benchmarks/measure_training.py --memory iddpm-imagenet64-cond --batch 2

A preset's row is one process with all cores, or a GPU: images a second, and what they are in
operations as a share of a large matrix product's of the same dtype, measured after each turn in the
same process. Then the forms in which N processes (one for each core, or GPU) share a batch. All are
the Trainer's own steps; a figure is the median of its turns, and of the rounds in which the forms
take turns. What other programs took of the CPUs meanwhile stands beside it.

Rows go to benchmarks/results/training/; report.py makes tables of docs/benchmarks.md of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdiff.models import presets
from harness import results
from report import training_tables

NETWORKS = presets.names("UNet")
# No second names, and no upsamplers, which are trained on pairs of images.
NAMES = [
    name
    for name in NETWORKS
    if presets.get(name).name == name and not presets.get(name).model.get("super_res")
]
RANKS_OF = ("digits", "ddpm-cifar10")
DTYPES = ("float32", "bfloat16")
# Images of a step, by their side: on two cores it takes seconds at most.
BATCHES = {"cpu": {8: 64, 32: 8, 64: 1, 256: 1}, "cuda": {8: 1024, 32: 256, 64: 32, 256: 8}}
PARTS = ("parameters", "gradients", "optimizer", "average", "resident", "peak")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")  # /proc/stat's unit


@dataclass(frozen=True)
class Form:
    """A way to take a step of a batch; ``variant`` of its rows.

    The batch is cut into ``parts``, of which ``runs`` are taken at the same time by runs that know
    nothing of each other, each of ``ranks`` processes of ``threads``.
    """

    variant: str
    parts: int = 1
    runs: int = 1
    ranks: int = 1
    threads: int = 1
    shard: bool = False


def forms(count: int, cuda: bool) -> list[Form]:
    """Of ``count`` cores or GPUs: "apart" is the most that a shared machine leaves to its ranks."""
    whole = [] if cuda else [Form("whole", threads=count)]
    return [
        *whole,
        Form("one", parts=count),
        Form("apart", parts=count, runs=count),
        Form("ddp", ranks=count),
        Form("fsdp2", ranks=count, shard=True),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--presets", nargs="*", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--ranks", nargs="*", choices=NAMES, default=RANKS_OF, metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rounds", type=int, default=3, help="in which the forms take turns")
    parser.add_argument("--turns", type=int, default=3, help="of a process in a round")
    parser.add_argument("--memory", choices=NAMES, metavar="NAME", help="of its ranks, alone")
    parser.add_argument("--batch", type=int, help="of all ranks, instead of the script's choice")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/training/DEVICE.json")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    count = torch.cuda.device_count() if cuda else len(os.sched_getaffinity(0))
    if args.memory:
        print_memory(args.memory, args.batch or batch_of(args.memory, cuda), count)
        return
    found = opened(args.out, count, cuda)
    measure = ["--dtypes", *args.dtypes, "--turns", str(args.turns)]
    for preset in args.presets:
        form = Form("preset", threads=1 if cuda else count)
        batch = args.batch or batch_of(preset, cuda)
        for row in run(preset, batch, form, [*measure, "--roofline"]):
            keep(found, [row], form)
    for preset in args.ranks if count > 1 else ():
        batch = args.batch or batch_of(preset, cuda)
        every = forms(count, cuda)
        rounds = [[run(preset, batch, form, measure) for form in every] for _ in range(args.rounds)]
        for form, turns in zip(every, zip(*rounds, strict=True), strict=True):
            for of_dtype in zip(*turns, strict=True):
                keep(found, of_dtype, form)
    found.save()
    print(training_tables({**found.header, "date": results.today(), "rows": found.rows()}))


def batch_of(preset: str, cuda: bool) -> int:
    return BATCHES["cuda" if cuda else "cpu"][presets.get(preset).model["image_size"]]


def opened(path: Path | None, count: int, cuda: bool) -> results.Results:
    """The file of this machine; its rows stay unless they are measured again."""
    if not cuda:
        torch.set_num_threads(count)
    device = torch.device("cuda" if cuda else "cpu")
    default = results.default_path(device)
    path = path or default.parent / "training" / default.name
    return results.Results(path, {**results.machine(device), "ranks": count})


def keep(found: results.Results, rounds: Sequence[dict[str, Any]], form: Form) -> None:
    """A row of the medians of the rounds."""
    row = {"op": "training", "variant": form.variant, "layout": "", "direction": "step"}
    row |= {name: rounds[0][name] for name in ("shape", "batch", "dtype")}
    row |= {"rounds": len(rounds)}
    row["images_per_s"] = statistics.median(each["images_per_s"] for each in rounds)
    if "matmul_tflops" in rounds[0]:
        (only,) = rounds
        row["flops_per_image"] = only["flops_per_image"]
        row["tflops"] = only["flops_per_image"] * only["images_per_s"] / 1e12
        row["matmul_tflops"] = only["matmul_tflops"]
        row["percent_of_matmul"] = 100 * row["tflops"] / only["matmul_tflops"]
    row["others_percent"] = max(each["others_percent"] for each in rounds)
    found.add(row)
    print({name: row[name] for name in ("shape", "variant", "dtype", "images_per_s")}, flush=True)


def run(preset: str, batch: int, form: Form, options: Sequence[str]) -> list[dict[str, Any]]:
    """One round of a form: for each dtype the images a second of all its runs, and what the first
    rank measured beside its steps."""
    before, began = others_seconds(), time.monotonic()
    started = [start(preset, batch // form.parts, form, options, i) for i in range(form.runs)]
    answers = [answer(process) for process in started]
    others = (others_seconds() - before) / (time.monotonic() - began) / (os.cpu_count() or 1)
    rounds = []
    for same_dtype in zip(*answers, strict=True):
        firsts = [every_rank[0] for every_rank in same_dtype]
        rate = sum(batch // form.parts / first["step_s"] for first in firsts)
        of_round = {"images_per_s": rate, "others_percent": 100 * others}
        rounds.append({**firsts[0], **of_round, "shape": preset, "batch": batch})
    return rounds


def start(
    preset: str, batch: int, form: Form, options: Sequence[str], number: int
) -> subprocess.Popen:
    """Run ``number`` of those at the same time, on a GPU of its own if there are any."""
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(form.ranks)]
    own = ["-m", "harness.training", preset, str(batch), *options, *["--shard"] * form.shard]
    environment = {**os.environ, "OMP_NUM_THREADS": str(form.threads)}
    if form.ranks == 1:
        environment["CUDA_VISIBLE_DEVICES"] = str(number)
    return subprocess.Popen(
        [sys.executable, *(launcher if form.ranks > 1 else []), *own],
        cwd=Path(__file__).parent,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen) -> list[list[dict[str, Any]]]:
    """For each dtype, what each rank measured."""
    printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(process.args)} failed with {process.returncode}, see above")
    return json.loads(printed)


def others_seconds() -> float:
    """CPU time that other programs have taken since the machine started, and a constant: the
    machine's without that of the processes that this one started and that have ended."""
    first = Path("/proc/stat").read_text().splitlines()[0].split()
    user, nice, system, _idle, _iowait, irq, softirq = map(int, first[1:8])
    own = os.times()
    busy = (user + nice + system + irq + softirq) * TICK_S
    return busy - own.children_user - own.children_system


def print_memory(preset: str, batch: int, count: int) -> None:
    print(f"\n| {preset}, batch {batch}, MB a rank | " + " | ".join(PARTS) + " |")
    print("|---" * (1 + len(PARTS)) + "|", flush=True)
    for name, shard in ("DDP", False), ("FSDP2", True):
        form = Form(name, ranks=count, shard=shard)
        (every,) = answer(start(preset, batch, form, ["--turns", "0"], 0))
        cells = [f"{max(rank[part] for rank in every):.0f}" for part in PARTS]
        print(f"| {count} ranks, {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

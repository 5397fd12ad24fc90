"""Images a second and Fréchet ratio of a network, by ways of sampling that take turns.

    fastdiff train --preset digits --data digits --steps 1000 --lr 0.002 --out runs/digits
    python benchmarks/measure_combination.py --checkpoint runs/digits --data digits

A way is a method with its steps and their spacing, with reuse of deep features or without, and the
network as it is (executor=False) or as a program. The first is what all are compared with: rates
are of the same round, the median of the rounds' ratios counts. The Fréchet ratio of a way's images
is ``fastdiff.evaluation.scores.FrechetRatio``'s, the same images in every round.

Rows go to benchmarks/results/combination/.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoints.checkpoint import Checkpoint, load
from fastdiff.commands import networks
from fastdiff.data import load_dataset
from fastdiff.evaluation.scores import FrechetRatio
from fastdiff.images import to_bytes
from fastdiff.sampling.sampler import Sampler
from harness import results

DDIM = {"method": "ddim", "steps": 50}
DEIS = {"method": "deis", "spacing": "beta", "steps": 15}
SDE = {"method": "sde-dpmsolver++", "spacing": "beta", "steps": 10}
TRAILING = {"spacing": "trailing", "steps": 6}
WAYS: dict[str, dict[str, Any]] = {
    "DDIM, 50 steps, network as it is": {**DDIM, "executor": False},
    "DDIM, 50 steps": DDIM,
    "DDIM, 50 steps, reuse=3": {**DDIM, "reuse": 3},
    "DEIS, beta, 15 steps": DEIS,
    "DEIS, beta, 15 steps, reuse=2": {**DEIS, "reuse": 2},
    "SDE-DPM-Solver++(2M), beta, 10 steps": SDE,
    "SDE-DPM-Solver++(2M), beta, 10 steps, reuse=2": {**SDE, "reuse": 2},
    "SDE-DPM-Solver++(3M), trailing, 6 steps": {**TRAILING, "method": "sde-dpmsolver++3m"},
    "UniPC, trailing, 6 steps": {**TRAILING, "method": "unipc"},
    "UniPC, trailing, 6 steps, reuse=2": {**TRAILING, "method": "unipc", "reuse": 2},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, metavar="DIR")
    parser.add_argument("--data", required=True, metavar="SPEC", help="as of fastdiff evaluate")
    parser.add_argument("--num", type=int, default=1000, help="images of each way")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--out", type=Path, metavar="FILE", help="in place of the results' own")
    args = parser.parse_args(argv)
    checkpoint = load(args.checkpoint)
    dataset = load_dataset(args.data, class_cond=True)
    frechet = FrechetRatio(dataset)
    shape = (dataset.channels, *dataset.image_size)
    samplers = {name: sampler_of(checkpoint, WAYS[name]) for name in args.ways}
    rates: dict[str, list[float]] = {name: [] for name in samplers}
    distances: dict[str, float] = {}
    classes = networks.num_classes(checkpoint)

    def drawn(sampler: Sampler, count: int) -> tuple[torch.Tensor, float]:
        """Images, of classes in turn, and the seconds that they took."""
        started, parts = time.perf_counter(), []
        for first in range(0, count, args.batch_size):
            size = min(args.batch_size, count - first)
            kwargs = {}
            if classes is not None:
                kwargs = networks.labelled(checkpoint, torch.arange(first, first + size) % classes)
            given: dict[str, Any] = {"seed": 1, "first_sample": first, "model_kwargs": kwargs}
            parts.append(sampler.sample((size, *shape), **given))
        return torch.cat(parts), time.perf_counter() - started

    for sampler in samplers.values():  # plans, threads
        drawn(sampler, min(2, args.num))
    for _ in range(args.rounds):
        for name, sampler in samplers.items():
            images, seconds = drawn(sampler, args.num)
            rates[name].append(len(images) / seconds)
            if name not in distances:
                distances[name] = frechet(to_bytes(images))
    rows = [
        {
            "way": name,
            "calls": len(sampler.table),
            "images_s": statistics.median(rates[name]),
            "ratio": ratio(rates[name], rates[args.ways[0]]),
            "frechet": distances[name],
        }
        for name, sampler in samplers.items()
    ]
    device = torch.device("cpu")
    found = {"machine": results.machine(device), "num": args.num, "rows": rows}
    own = results.default_path(device)
    out = args.out or own.parent / "combination" / own.name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


def sampler_of(checkpoint: Checkpoint, options: dict[str, Any]) -> Sampler:
    return Sampler(checkpoint.model, checkpoint.diffusion, **options)


def ratio(rates: Sequence[float], of_first: Sequence[float]) -> float:
    """The median over the rounds."""
    return statistics.median(mine / first for mine, first in zip(rates, of_first, strict=True))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| way | network calls | images/s | against the first | Fréchet ratio |"]
    lines.append("|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| {row['way']} | {row['calls']} | {row['images_s']:.0f} | {row['ratio']:.1f}× | "
            f"{row['frechet']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

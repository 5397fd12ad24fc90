"""What training by several processes costs and saves: images a second, and memory of each rank.

    python benchmarks/measure_ranks.py
    python benchmarks/measure_ranks.py --memory iddpm-imagenet64-cond --batch 2

gloo's ranks on this machine's CPUs, one thread each, started by torchrun; they share the batch. A
row's rate is the median step of the best of some rounds, in which the rows take turns. The images
are noise, the dropout 0.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastdiff
from fastdiff.data import ArrayDataset
from fastdiff.models import presets
from fastdiff.models.shards import local
from fastdiff.training import TrainConfig, Trainer

# (what it is, ranks, threads of each, --shard)
ROWS = (
    ("one process, 1 thread", 1, 1, False),
    ("one process, 2 threads", 1, 2, False),
    ("2 ranks, DDP", 2, 1, False),
    ("2 ranks, FSDP2", 2, 1, True),
)
SAME_THREADS = 1  # the row whose threads are as many as all ranks have
BATCHES = {"digits": 64, "ddpm-cifar10": 8}
PARTS = ("parameters", "gradients", "optimizer", "average", "resident", "peak")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--presets", nargs="*", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=8.0, help="of each row's steps in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--memory", choices=presets.names(), help="the memory of this preset alone")
    parser.add_argument("--batch", type=int, default=2, help="with --memory")
    parser.add_argument("--rank", nargs=4, metavar=("PRESET", "BATCH", "SECONDS", "SHARD"))
    args = parser.parse_args()
    if args.rank:
        preset, batch, seconds, shard = args.rank
        every = measure(preset, int(batch), float(seconds), shard == "1")
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(every))
        return
    if args.memory:
        print_memory(args.memory, args.batch)
        return
    for preset in args.presets:
        print_rates(preset, args.seconds, args.rounds)


def print_rates(preset: str, seconds: float, rounds: int) -> None:
    batch = BATCHES[preset]
    found: list[list[list[dict[str, Any]]]] = [[] for _ in ROWS]
    for _ in range(rounds):
        for row, (_, ranks, threads, shard) in enumerate(ROWS):
            found[row].append(run(preset, batch, seconds, ranks, threads, shard))
    rates = [max(every[0]["images/s"] for every in turns) for turns in found]
    print(f"\n| {preset}, batch {batch} | images/s | of 2 threads' | peak MB a rank |")
    print("|---|---|---|---|")
    for (name, *_), rate, turns in zip(ROWS, rates, found, strict=True):
        peak = max(rank["peak"] for rank in turns[0])
        print(f"| {name} | {rate:.1f} | {rate / rates[SAME_THREADS]:.2f} | {peak:.0f} |")


def print_memory(preset: str, batch: int) -> None:
    print(f"\n| {preset}, batch {batch}, MB a rank | " + " | ".join(PARTS) + " |")
    print("|---" * (1 + len(PARTS)) + "|", flush=True)
    for name, ranks, threads, shard in ROWS[SAME_THREADS + 1 :]:
        every = run(preset, batch, 0, ranks, threads, shard)
        cells = [f"{max(rank[part] for rank in every):.0f}" for part in PARTS]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def run(
    preset: str, batch: int, seconds: float, ranks: int, threads: int, shard: bool
) -> list[dict[str, Any]]:
    """What each rank measured."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    own = [__file__, "--rank", preset, str(batch), str(seconds), str(int(shard))]
    done = subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), *own],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def measure(preset: str, batch: int, seconds: float, shard: bool) -> list[dict[str, Any]]:
    """Take steps for so many seconds, two at least; each rank's rate and memory in MB."""
    torch.manual_seed(0)
    settings = presets.get(preset)
    model = fastdiff.UNet.from_preset(preset, dropout=0.0)
    size = settings.model.get("image_size", 8)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2 * batch, size, size, model.in_channels), np.uint8)
    classes = settings.model.get("num_classes")
    labels = None if classes is None else np.arange(2 * batch) % classes
    names = None if classes is None else [str(i) for i in range(classes)]
    data = ArrayDataset(images, labels=labels, class_names=names)
    config = TrainConfig(batch_size=batch, shard=shard, ema=(0.9999,), tensorboard=False)
    diffusion = fastdiff.create_diffusion(**settings.diffusion)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model, diffusion, data, config, Path(folder), device="cpu", progress=False
        )
        times = taken(trainer, seconds)
    return trainer.ranks.gather({"images/s": batch / statistics.median(times), **memory(trainer)})


def taken(trainer: Trainer, seconds: float) -> list[float]:
    """Seconds of each step after the first. All ranks take as many."""
    trainer._train_step()
    times: list[float] = []
    while trainer.ranks.numbers(int(sum(times) < seconds or not times)).any():
        start = time.perf_counter()
        trainer._train_step()
        times.append(time.perf_counter() - start)
    return times


def memory(trainer: Trainer) -> dict[str, float]:
    """In MB (1e6 bytes), after a step."""
    state = (value for moments in trainer.optimizer.state.values() for value in moments.values())
    found = {
        "parameters": held(trainer.parameters),
        "gradients": held(p.grad for p in trainer.parameters if p.grad is not None),
        "optimizer": held(state),
        "average": held(value for shadow in trainer.ema.shadows.values() for value in shadow),
        "resident": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(),
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    return {name: value / 1e6 for name, value in found.items()}


def held(tensors: Iterable[Tensor]) -> int:
    return sum(local(tensor).nbytes for tensor in tensors)


if __name__ == "__main__":
    main()

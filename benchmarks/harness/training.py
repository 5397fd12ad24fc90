"""One process of measure_training.py: the steps of a preset's training, timed.

    python -m harness.training PRESET BATCH [--dtypes float32 bfloat16] [--turns 3] [--shard]
        [--roofline]

Alone, or as each of the ranks that torchrun starts. Prints a JSON list: for each dtype a list of
what each rank measured. The steps are the Trainer's own, by the preset's settings; the images are
noise.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff.experiments.rates import noise_images
from fastdiff.models import presets
from fastdiff.models.flops import unet_flops
from fastdiff.models.shards import local
from fastdiff.ranks import Ranks, join
from fastdiff.training import TrainConfig, Trainer
from harness.timing import matmul_tflops

TURN_S = 0.5  # a turn has as many steps as this holds, one at least


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("preset")
    parser.add_argument("batch", type=int, help="of all ranks")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--turns", type=int, default=3, help="0: one step, for its memory alone")
    parser.add_argument("--shard", action="store_true")
    parser.add_argument(
        "--roofline", action="store_true", help="operations, and a matrix product's rate each turn"
    )
    args = parser.parse_args()
    ranks = join(None)
    counted = {"flops_per_image": training_flops(args.preset)} if args.roofline else {}
    found = []
    for dtype in args.dtypes:
        mine = measure(args.preset, args.batch, dtype, args.turns, args.shard, args.roofline, ranks)
        found.append(ranks.gather({"dtype": dtype, **counted, **mine}))
    if ranks.rank == 0:
        print(json.dumps(found))


def measure(
    preset: str, batch: int, dtype: str, turns: int, shard: bool, roofline: bool, ranks: Ranks
) -> dict[str, float]:
    """The medians of this rank's turns, and its memory in MB (1e6 bytes)."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(preset, batch, Path(folder) / "run", ranks, dtype=dtype, shard=shard)
        times, peaks = taken(trainer, turns, getattr(torch, dtype) if roofline else None)
    found = {"step_s": statistics.median(times)}
    if peaks:
        found["matmul_tflops"] = statistics.median(peaks)
    return {**found, **memory(trainer)}


def trainer_of(
    preset: str, batch: int, run: Path, ranks: Ranks | None = None, **settings: Any
) -> Trainer:
    """A preset's, but for its batch, which is of all ranks, and ``settings``; its images are
    noise."""
    torch.manual_seed(0)
    found = presets.get(preset)
    config = TrainConfig(**{**found.train, "batch_size": batch, **settings, "tensorboard": False})
    settings = found.model
    size, channels = 2 * (settings["image_size"],), settings["in_channels"]
    model = fastdiff.UNet.from_preset(preset)
    data = noise_images(2 * batch, size, channels, settings.get("num_classes"))
    diffusion = fastdiff.create_diffusion(**found.diffusion)
    return Trainer(model, diffusion, data, config, run, progress=False, ranks=ranks)


def taken(
    trainer: Trainer, turns: int, product: torch.dtype | None
) -> tuple[list[float], list[float]]:
    """Seconds a step in each turn, and after each the rate of a matrix product of that dtype.

    All ranks take as many steps. What comes before the first turn (allocations, the choice of
    algorithms) is not counted.
    """
    first = seconds_a_step(trainer, 1)
    if turns == 0:
        return [first], []
    microseconds = trainer.ranks.numbers(int(1e6 * seconds_a_step(trainer, 1)))
    steps = max(1, round(1e6 * TURN_S / int(microseconds.max())))
    times, peaks = [], []
    for _ in range(turns):
        times.append(seconds_a_step(trainer, steps))
        if product is not None:
            peaks.append(matmul_tflops(trainer.device, product))
    return times, peaks


def seconds_a_step(trainer: Trainer, steps: int) -> float:
    synchronize(trainer.device)
    start = time.perf_counter()
    for _ in range(steps):
        trainer._train_step()
    synchronize(trainer.device)
    return (time.perf_counter() - start) / steps


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def training_flops(preset: str) -> int:
    """Of an image's forward and backward pass."""
    settings = presets.get(preset).model
    return unet_flops(settings, settings["image_size"], training=True)


def memory(trainer: Trainer) -> dict[str, float]:
    """In MB (1e6 bytes), after a step; resident and peak are of the CPUs' memory."""
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

"""A training run small enough for tests. As a script it is that run in a process of its own:

python training_tools.py RUN_DIR SETTINGS_JSON EVENT PATTERN COUNT

resumes RUN_DIR, or starts there, and kills itself with SIGKILL at the COUNT-th audit event EVENT
whose arguments match PATTERN ("step" is an event too: its argument is the number of the step).
"""

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff.checkpoints.run_directory import list_checkpoints
from fastdiff.data import ArrayDataset
from fastdiff.models.unet import UNet
from fastdiff.process.gaussian import create_diffusion
from fastdiff.training import TrainConfig, Trainer

# Everything that has a state: dropout, flips, hidden labels, importance sampling, two averages.
# Saves, log lines and epochs (3 steps) do not coincide.
SETTINGS: dict[str, Any] = {
    "batch_size": 8,
    "steps": 25,
    "lr": 1e-3,
    "lr_schedule": "cosine",
    "warmup": 3,
    "weight_decay": 0.01,
    "ema": (0.9, 0.99),
    "label_dropout": 0.2,
    "timestep_sampler": "loss-second-moment",
    "flip": True,
    "log_every": 4,
    "save_every": 10,
    "tensorboard": False,
}


def make_dataset(count: int = 24, classes: int = 3, size: int = 8) -> ArrayDataset:
    rng = np.random.default_rng(0)
    return ArrayDataset(
        rng.integers(0, 256, (count, size, size, 1), np.uint8),
        labels=np.arange(count) % classes,
        class_names=[f"c{i}" for i in range(classes)],
    )


def make_model(**changes: Any) -> UNet:
    torch.manual_seed(1)
    arguments = {
        "in_channels": 1,
        "model_channels": 32,
        "out_channels": 2,
        "num_res_blocks": 1,
        "attention_resolutions": (),
        "channel_mult": (1,),
        "dropout": 0.1,
        "num_classes": 3,
        "null_class": True,
        **changes,
    }
    model = UNet(**arguments)
    # The published initialisation silences whole branches; awake, every parameter has a gradient.
    for parameter in model.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def make_diffusion(**changes: Any):
    return create_diffusion(
        **{
            "steps": 8,
            "noise_schedule": "cosine",
            "learn_sigma": True,
            "rescale_learned_sigmas": True,
            **changes,
        }
    )


def make_trainer(run_dir: Path, *, model: dict | None = None, **settings: Any) -> Trainer:
    return Trainer(
        make_model(**(model or {})),
        make_diffusion(),
        make_dataset(),
        TrainConfig(**{**SETTINGS, **settings}),
        run_dir,
        device="cpu",
        progress=False,
    )


def resume_trainer(run_dir: Path, **changes: Any) -> Trainer:
    return Trainer.resume(run_dir, make_dataset(), changes=changes, device="cpu", progress=False)


def read_lines(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [without_clock(line) for line in lines]


def without_clock(line: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in line.items() if k not in ("steps_per_second", "seconds_left")}


def at_step(trainer: Trainer, number: int, action) -> None:
    """Call ``action()`` before step ``number`` is taken."""
    take = trainer._train_step

    def hooked() -> None:
        if trainer.step + 1 == number:
            action()
        take()

    trainer._train_step = hooked  # type: ignore[method-assign]


def _main(run_dir: str, settings: str, event: str, pattern: str, count: str) -> None:
    torch.set_num_threads(1)
    left = int(count)

    def kill_at(name: str, arguments: tuple) -> None:
        nonlocal left
        if name == event and any(re.search(pattern, str(a)) for a in arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    run = Path(run_dir)
    changes = json.loads(settings)
    trainer = (
        resume_trainer(run, **changes) if list_checkpoints(run) else make_trainer(run, **changes)
    )
    take = trainer._train_step

    def announce() -> None:
        sys.audit("step", f"#{trainer.step + 1}#")
        take()

    trainer._train_step = announce  # type: ignore[method-assign]
    sys.addaudithook(kill_at)
    trainer.fit()


if __name__ == "__main__":
    _main(*sys.argv[1:])

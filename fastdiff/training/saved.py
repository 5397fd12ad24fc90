"""A checkpoint as a trainer reads it back: all of it, or an error that names the damaged file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.checkpoints.checkpoint import load
from fastdiff.checkpoints.weights import load_json, load_tensors
from fastdiff.errors import InputError
from fastdiff.models.unet import UNet
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.training.config import TrainConfig
from fastdiff.training.state import with_prefix

STATE = "trainer"  # file stem of the trainer's own part of a checkpoint


@dataclass(frozen=True)
class SavedRun:
    """Everything in one checkpoint directory of a training run."""

    path: Path
    model: UNet
    diffusion: GaussianDiffusion
    config: TrainConfig
    info: Mapping[str, Any]
    step: int
    reported: int
    batches_drawn: int
    images: int
    averages: Mapping[str, Mapping[str, Tensor]]
    tensors: Mapping[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The trainer's tensors of one origin: optimizer, timesteps, meter or rng."""
        return with_prefix(prefix, self.tensors)


def read_checkpoint(path: Path) -> SavedRun:
    """Read every file of ``path``. Raises InputError naming the file that is missing or damaged."""
    try:
        loaded = load(path, weights="model")
        record = load_json(path, STATE)
        return SavedRun(
            path=path,
            model=loaded.model,
            diffusion=loaded.diffusion,
            # Before there was a choice, the averages' rates were constant.
            config=TrainConfig.from_dict({"ema_warmup": False, **record["config"]}),
            info=loaded.info,
            step=record["step"],
            reported=record.get("reported", record["step"]),
            batches_drawn=record["batches_drawn"],
            images=record["images"],
            averages={r: load_tensors(path, f"ema_{r}") for r in loaded.ema_rates},
            tensors=load_tensors(path, STATE),
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{path / STATE}.json lacks {error}; {_advice(path)}") from error
    except InputError as error:
        raise InputError(f"{error}; {_advice(path)}") from error


def _advice(path: Path) -> str:
    return f"delete {path} to resume from the checkpoint before it"

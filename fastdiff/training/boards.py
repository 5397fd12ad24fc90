"""Where a run's figures are looked at beside metrics.jsonl: TensorBoard, Weights & Biases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from fastdiff.errors import InputError, first_line
from fastdiff.optional import require
from fastdiff.training.config import TrainConfig


class Board(Protocol):
    """Values by name, and uint8 images (N, C, H, W), of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def write_images(self, step: int, name: str, images: Tensor) -> None: ...
    def close(self) -> None: ...


def open_boards(
    run_dir: Path, step: int, config: TrainConfig, info: Mapping[str, Any]
) -> list[Board]:
    """Those that the settings name, for what comes after ``step``. InputError: one cannot be."""
    boards: list[Board] = []
    if config.tensorboard:
        boards.append(TensorBoard(run_dir / "tensorboard", step))
    if config.wandb:
        boards.append(WeightsAndBiases(run_dir, config, info))
    return boards


class TensorBoard:
    """Event files in ``directory``; what an earlier process wrote past ``step`` is not shown."""

    def __init__(self, directory: Path, step: int) -> None:
        require("tensorboard", "train")
        try:
            str(directory).encode()
        except UnicodeEncodeError:
            raise InputError(
                f"TensorBoard cannot write into '{directory}', whose name is not UTF-8: choose "
                "another folder, or give --no-tensorboard (in Python tensorboard=False)"
            ) from None
        writer = require("torch.utils.tensorboard", "train").SummaryWriter
        self.writer = writer(str(directory), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def write_images(self, step: int, name: str, images: Tensor) -> None:
        self.writer.add_images(name, images, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of the project ``config.wandb``, the same one when it is resumed (``info["wandb"]``).

    Its files lie in ``run_dir``/wandb; with WANDB_MODE=offline in the environment they stay there,
    for ``wandb sync``.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, info: Mapping[str, Any]) -> None:
        self.wandb = require("wandb", "wandb")
        try:
            self.run = self.wandb.init(
                project=config.wandb,
                name=run_dir.absolute().name,
                id=info["wandb"],
                resume="allow",
                dir=str(run_dir),
                config={"train": config.to_dict(), "info": dict(info)},
                settings=self.wandb.Settings(console="off"),
            )
        except self.wandb.Error as error:
            raise InputError(
                f"Weights & Biases cannot log to the project '{config.wandb}': {first_line(error)}"
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def write_images(self, step: int, name: str, images: Tensor) -> None:
        pictures = [self.wandb.Image(image.movedim(0, -1).numpy()) for image in images]
        self.run.log({name: pictures}, step=step)

    def close(self) -> None:
        self.run.finish()

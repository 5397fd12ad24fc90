"""Training: ``Trainer(model, diffusion, dataset, TrainConfig(...), run_dir).fit()``."""

from fastdiff.training.config import TrainConfig
from fastdiff.training.trainer import Trainer

__all__ = ["TrainConfig", "Trainer"]

"""Networks, averages of their weights, and checkpoints."""

from fastdiff.models.checkpoint import Checkpoint, load, save
from fastdiff.models.ema import EMA
from fastdiff.models.published import load_published, unet_config_from_state
from fastdiff.models.unet import UNet

__all__ = ["EMA", "Checkpoint", "UNet", "load", "load_published", "save", "unet_config_from_state"]

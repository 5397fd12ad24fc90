"""Networks and averages of their weights."""

from fastdiff.models.ema import EMA
from fastdiff.models.encoder_unet import EncoderUNet
from fastdiff.models.unet import UNet

__all__ = ["EMA", "EncoderUNet", "UNet"]

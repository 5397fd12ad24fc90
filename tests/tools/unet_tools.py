"""Small U-Nets and their inputs."""

import torch

from fastdiff import UNet

SMALL = {
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
}


def small_unet(**changes) -> UNet:
    """A network whose layers that start at zero do not, so that every path shows in the output."""
    torch.manual_seed(0)
    model = UNet(**{**SMALL, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def batch(model: UNet, *size: int, n: int = 2):
    x = torch.randn(n, model.in_channels, *size)
    y = None if model.num_classes is None else torch.arange(n) % model.num_classes
    return x, torch.linspace(0, 999, n), y

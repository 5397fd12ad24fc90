"""Networks that are not fastdiff's: a small DiT, a module of a few lines, diffusers' U-Net."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn


class SmallDiT(nn.Module):
    """Patches, two transformer layers, a label; and a ``config`` by which it is made.

    Its positions are a buffer of integers, its count of samples one that no average holds.
    """

    def __init__(self, size: int = 8, channels: int = 1, width: int = 16, num_classes: int = 3):
        super().__init__()
        self.config = {"size": size, "channels": channels, "width": width}
        self.config |= {"num_classes": num_classes}
        self.num_classes, self.null_label = num_classes, num_classes
        self.patch = nn.Conv2d(channels, width, 2, stride=2)
        self.place = nn.Embedding((size // 2) ** 2, width)
        self.register_buffer("places", torch.arange((size // 2) ** 2))
        self.register_buffer("seen", torch.zeros(()))
        self.time = nn.Linear(1, width)
        self.label = nn.Embedding(num_classes + 1, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.ConvTranspose2d(width, channels, 2, stride=2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
        h = self.patch(x)
        tokens = h.flatten(2).transpose(1, 2) + self.place(self.places)
        tokens = tokens + (self.time(t[:, None] / 1000) + self.label(y))[:, None]
        return self.out(self.blocks(tokens).transpose(1, 2).reshape(h.shape))


class Plain(nn.Module):
    """A user's first try: no config, another name for the time, dropout."""

    def __init__(self, channels: int = 1, width: int = 8):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels + 1, width, 3, padding=1),
            nn.Dropout(0.1),
            nn.SiLU(),
            nn.Conv2d(width, channels, 3, padding=1),
        )

    def forward(self, x: Tensor, when: Tensor) -> Tensor:
        level = (when / 1000).view(-1, *[1] * (x.dim() - 1)).expand_as(x[:, :1])
        return self.body(torch.cat([x, level.to(x.dtype)], 1))


def diffusers_unet(**changes: Any) -> nn.Module:
    """A UNet2DModel for 8x8 images of one channel; the test is skipped without diffusers."""
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    blocks |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16)}
    rest = {"layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    return diffusers.UNet2DModel(**blocks, **sizes, **{**rest, **changes})

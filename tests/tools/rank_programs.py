"""What a user's script does that torchrun starts; its exit code is returned."""

import torch

from fastdiff.process.gaussian import create_diffusion
from fastdiff.training import TrainConfig, Trainer
from network_tools import diffusers_unet


def train_diffusers_unet(run: str, shard: bool = False) -> int:
    """Six steps of diffusers' U-Net, which has no dropout, on images of noise."""
    torch.manual_seed(0)
    model, images = diffusers_unet(), torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8)
    config = TrainConfig(
        batch_size=4, steps=6, lr=1e-3, ema=(0.9,), log_every=2, shard=shard, tensorboard=False
    )
    diffusion = create_diffusion(steps=8, noise_schedule="cosine")
    Trainer(model, diffusion, images, config, run, device="cpu", progress=False).fit()
    return 0

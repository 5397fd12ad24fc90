"""The same network and training step in fastdiff and in diffusers (sampling: peers_sampling.py).

Both get the same size of network, batch, optimizer, autocast dtype and noise schedule; each runs as
its own documentation has it: diffusers in its default layout, fastdiff in its default layout.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel

import fastdiff

Step = Callable[[], object]

# Arguments of fastdiff's network (or its preset), and those that give diffusers the same size.
NETWORKS: dict[str, tuple[str | dict, dict]] = {
    "ddpm-cifar10": (
        "ddpm-cifar10",
        {
            "layers_per_block": 2,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "dropout": 0.1,
        },
    ),
    "iddpm-imagenet64": (
        "iddpm-imagenet64",
        {
            "sample_size": 64,
            "out_channels": 6,
            "layers_per_block": 3,
            "block_out_channels": (128, 256, 384, 512),
            "down_block_types": ("DownBlock2D", "DownBlock2D", *("AttnDownBlock2D",) * 2),
            "up_block_types": (*("AttnUpBlock2D",) * 2, "UpBlock2D", "UpBlock2D"),
            "resnet_time_scale_shift": "scale_shift",
            "attention_head_dim": 64,  # theirs is one for all levels
        },
    ),
    "small": (
        {
            "in_channels": 3,
            "out_channels": 3,
            "model_channels": 64,
            "num_res_blocks": 1,
            "channel_mult": (1, 2, 2),
            "attention_resolutions": (2,),
        },
        {
            "layers_per_block": 1,
            "block_out_channels": (64, 128, 128),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        },
    ),
}
SIZE = 32


def fastdiff_network(name: str) -> fastdiff.UNet:
    own, _ = NETWORKS[name]
    return fastdiff.UNet.from_preset(own) if isinstance(own, str) else fastdiff.UNet(**own)


def diffusers_network(name: str) -> UNet2DModel:
    _, theirs = NETWORKS[name]
    one_head = {"sample_size": SIZE, "out_channels": 3, "attention_head_dim": None}
    model = UNet2DModel(**{"in_channels": 3, "norm_eps": 1e-5, **one_head, **theirs})
    theirs_count, ours = (count_parameters(m) for m in (model, fastdiff_network(name)))
    assert abs(theirs_count - ours) <= 1e-4 * ours
    return model


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def fastdiff_training_step(name: str, batch: int, dtype: torch.dtype) -> Step:
    model = fastdiff_network(name).train()
    diffusion = fastdiff.create_diffusion(steps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = images(batch).contiguous(memory_format=torch.channels_last)

    def network(*args):
        with autocast(dtype):
            return model(*args)

    def step() -> None:
        t = torch.randint(diffusion.num_timesteps, (batch,))
        optimizer.zero_grad(set_to_none=True)
        diffusion.training_losses(network, x, t)["loss"].mean().backward()
        optimizer.step()

    return step


def diffusers_training_step(name: str, batch: int, dtype: torch.dtype) -> Step:
    model = diffusers_network(name).train()
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = images(batch)

    def step() -> None:
        t = torch.randint(1000, (batch,))
        noise = torch.randn_like(x)
        optimizer.zero_grad(set_to_none=True)
        with autocast(dtype):
            prediction = model(scheduler.add_noise(x, noise, t), t).sample
        F.mse_loss(prediction.float(), noise).backward()
        optimizer.step()

    return step


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)

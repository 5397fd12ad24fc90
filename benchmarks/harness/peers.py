"""The same network and training step in fastdiff and in diffusers (sampling: peers_sampling.py).

One state_dict in both, and of every layer the values that PyTorch starts it with: a published U-Net
starts the last layer of each block at zero, and zeros are multiplied at less power and a higher
clock. Both get the same batch, optimizer, autocast dtype and noise schedule; each runs as its own
documentation has it: diffusers in its default layout, fastdiff in its default layout.

diffusers is imported where one of its parts is made, so that without it the others can be timed.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import fastdiff
from fastdiff.checkpoints.diffusers_unet import diffusers_state
from fastdiff.models import presets
from fastdiff.models.readers.diffusers.config import diffusers_config
from fastdiff.training.memory_order import memory_order

Step = Callable[[], object]

# Arguments of fastdiff's network; diffusers' follow from them.
NETWORKS: dict[str, dict[str, Any]] = {
    "ddpm-cifar10": presets.get("ddpm-cifar10").model,
    # Heads of one width at all levels, as UNet2DModel has them; the preset has four at each.
    "iddpm-imagenet64": {**presets.get("iddpm-imagenet64").model, "num_head_channels": 64},
    "small": {
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 64,
        "num_res_blocks": 1,
        "channel_mult": (1, 2, 2),
        "attention_resolutions": (2,),
        "image_size": 32,
    },
    "tiny": {  # to try a script with
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": (1, 1),
        "attention_resolutions": (2,),
        # Of more than one channel: a norm of each alone would take away what t has added to it.
        "norm_num_groups": 8,
        "image_size": 8,
    },
}


def fastdiff_network(name: str) -> fastdiff.UNet:
    """One of its own, with the same weights at every call, and no layer that starts at zero."""
    return copy.deepcopy(_network(name))


@functools.cache
def _network(name: str) -> fastdiff.UNet:
    """To be copied: of a hundred million weights that takes a tenth of the time to draw them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = fastdiff.UNet(**NETWORKS[name])
        for module in model.modules():
            if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Linear):
                module.reset_parameters()
    return model


def forget() -> None:
    """The networks that those of their own are copied from."""
    _network.cache_clear()


def diffusers_network(name: str) -> Any:
    """``fastdiff_network(name)`` as diffusers' UNet2DModel, with the same weights."""
    from diffusers import UNet2DModel

    ours = _network(name)
    with torch.device("meta"):  # all that it has is in the state
        model = UNet2DModel(**diffusers_config(ours))
    assert not list(model.buffers())
    model.to_empty(device="cpu").load_state_dict(diffusers_state(ours, ours.state_dict()))
    return model


def fastdiff_training_step(name: str, batch: int, dtype: torch.dtype) -> Step:
    model = fastdiff_network(name).train()
    diffusion = fastdiff.create_diffusion(steps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = images(name, batch).contiguous(memory_format=torch.channels_last)

    def network(*args):
        with autocast(dtype):
            return model(*args)

    def step() -> None:
        t = torch.randint(diffusion.num_timesteps, (batch,))
        optimizer.zero_grad(set_to_none=True)
        diffusion.training_losses(network, x, t)["loss"].mean().backward()
        with memory_order(optimizer):  # as the Trainer's
            optimizer.step()

    return step


def diffusers_training_step(name: str, batch: int, dtype: torch.dtype) -> Step:
    from diffusers import DDPMScheduler

    model = diffusers_network(name).train()
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = images(name, batch)

    def step() -> None:
        t = torch.randint(1000, (batch,))
        noise = torch.randn_like(x)
        optimizer.zero_grad(set_to_none=True)
        with autocast(dtype):
            prediction = model(scheduler.add_noise(x, noise, t), t).sample
        F.mse_loss(prediction.float(), noise).backward()
        optimizer.step()

    return step


def size(name: str) -> int:
    """Of the square images of a network of ``NETWORKS``."""
    return NETWORKS[name]["image_size"]


def images(name: str, batch: int) -> torch.Tensor:
    """Normal values; an image is the same in every batch."""
    side = size(name)
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)

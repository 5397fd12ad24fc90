"""Inputs for the models whose attributes tell them, to try a model on."""

from typing import Any

import torch
from torch import nn

from fastdiff.errors import InputError


def example_inputs(model: nn.Module) -> tuple[Any, ...]:
    """Positional arguments (x, timesteps, …) of a batch of two. InputError for unknown models."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    size, config = _image(model), getattr(model, "config", None)
    if size is None:
        raise InputError(
            f"the inputs of a {type(model).__name__} are not known; give verify=(x, timesteps, …)"
        )
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if parameter is None else parameter.dtype
    x = torch.randn(2, *size, generator=generator).to(device, dtype)
    arguments = [x, torch.tensor([10, 500], device=device)]
    classes = getattr(config, "num_class_embeds", None) or getattr(model, "num_classes", None)
    if classes:
        arguments.append(torch.tensor([0, classes - 1], device=device))
    return tuple(arguments)


def _image(model: Any) -> tuple[int, ...] | None:
    """(C, H, W)."""
    config: Any = getattr(model, "config", None)
    if type(model).__name__ == "UNet2DModel" and hasattr(config, "sample_size"):  # diffusers
        side = config.sample_size or 32
        sides = side if isinstance(side, tuple | list) else (side, side)
        return (config.in_channels, *sides)
    if hasattr(model, "in_channels") and hasattr(model, "input_blocks"):  # improved-, guided-
        dims = getattr(model, "dims", None) or model.input_blocks[0][0].weight.dim() - 2
        factor = 2 ** len(model.channel_mult) if hasattr(model, "channel_mult") else 16
        return (model.in_channels, *[max(factor, 16)] * dims)
    if hasattr(model, "channels") and hasattr(model, "downsample_factor"):  # lucidrains
        return (model.channels, *[4 * model.downsample_factor] * 2)
    return None

"""What the tests of programs share: U-Nets of every form with arguments, and changes of weights."""

import torch
from torch import nn

from fastdiff import UNet
from fastdiff.models import presets
from fastdiff.models.execution.executor import Executor
from fastdiff.models.readers import reading_of
from unet_tools import batch

# Everything of Ho et al.'s network but its size.
HO = {
    "channel_mult": (1, 2, 2),
    "norm_eps": 1e-6,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
}
ADM = {
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_new_attention_order": True,
    "num_head_channels": 16,
    "num_classes": 3,
    "out_channels": 6,
}
CASES = {
    "digits": (dict(presets.get("digits").model), (8, 8)),
    "plain": ({}, (8, 8)),
    "Ho et al.": (HO, (8, 8)),
    "ADM": (ADM, (8, 8)),
    "pools and repeats": ({"conv_resample": False}, (8, 8)),
    "upsampler": ({"super_res": True, "noise_cond": True, "num_classes": 3}, (8, 8)),
    "groups of one channel": ({"norm_num_groups": 32, "attention_resolutions": ()}, (8, 8)),
    "few channels": ({"model_channels": 6, "num_heads": 2, "in_channels": 1}, (8, 8)),
    "odd": (HO, (7, 9)),
    "odd in res blocks": (ADM, (5, 7)),
    "one pixel": ({}, (1, 1)),
    "1-D": ({"dims": 1, "use_scale_shift_norm": True}, (9,)),
    "3-D": ({"dims": 3, **HO}, (3, 8, 8)),
    "3-D in res blocks": ({"dims": 3, "resblock_updown": True}, (2, 5, 6)),
}


def arguments(model: UNet, size, n: int = 2) -> dict:
    x, t, y = batch(model, *size, n=n)
    given = {"x": x, "timesteps": t} | ({} if y is None else {"y": y})
    if model.super_res:
        given["low_res"] = torch.randn(n, model.in_channels, *(-(-side // 2) for side in size))
    if model.noise_cond:
        given["noise_level"] = torch.linspace(0.1, 0.6, n)
    return given


def in_dtype(given: dict, dtype: torch.dtype) -> dict:
    return {k: v.to(dtype) if k in ("x", "low_res") else v for k, v in given.items()}


def changes(model: UNet):
    """What may happen to weights, as functions of one layer."""
    layer = model.middle_block[0].in_layers[2]

    def exchange():
        layer.weight = nn.Parameter(layer.weight * 2)

    def in_place():
        layer.weight.mul_(2)

    def unseen():  # neither address nor version change
        layer.weight.data.mul_(2)

    def module():
        other = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1)
        model.middle_block[0].in_layers[2] = other

    return {"exchange": exchange, "in place": in_place, "unseen": unseen, "module": module}


def program_of(model, dtype=None):
    """Another codebase's network, as a program; it answers None to calls that are not for one."""
    reading = reading_of(model)
    assert reading.difference() == reading.disagreement() == ""
    executor = Executor(reading, dtype)

    def run(*args, **kwargs):
        call = reading.call(args, kwargs)
        return None if call is None else call.answer(executor(**call.arguments))

    return run

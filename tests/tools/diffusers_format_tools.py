"""A small UNet2DModel, and whether two networks are the same."""

from pathlib import Path

import torch
from diffusers import UNet2DModel

from fastdiff import UNet

TINY = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def theirs(config: dict, seed: int = 0) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(**config).eval()


def from_pretrained(path: Path) -> UNet2DModel:
    return UNet2DModel.from_pretrained(path, low_cpu_mem_usage=False)  # True is slow, or warns


def randomized(model: UNet, seed: int = 0) -> UNet:
    """No layer at zero, as they are at first, and no norm plain: every path shows."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@torch.no_grad()
def assert_same_output(ours: UNet, other: UNet2DModel | UNet) -> None:
    halvings = len(ours.config["channel_mult"]) - 1
    for n, height, width in ((2, 2, 2), (1, 4, 2), (3, 2, 3)):
        x = torch.randn(n, ours.in_channels, height << halvings, width << halvings)
        t = torch.randint(0, 1000, (n,))
        y = None if ours.num_classes is None else torch.randint(ours.num_classes, (n,))
        given_y = (t,) if y is None else (t, y)
        expected = other(x, *given_y)
        expected = expected if isinstance(other, UNet) else expected.sample
        error = (ours(x, *given_y) - expected).abs().max()
        assert error <= 1e-5 * expected.abs().max()


def assert_same_weights(one, other) -> None:
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())

"""Small networks in files, and fastdiff convert on them."""

from pathlib import Path

import torch

from fastdiff import UNet, cli

SMALL = {"in_channels": 1, "model_channels": 8, "out_channels": 2, "num_res_blocks": 1}
SMALL |= {"attention_resolutions": [2], "channel_mult": [1, 2], "image_size": 8, "num_heads": 2}
FLAGS = ["--num-heads", "2", "--attention-order", "heads_first", "--image-size", "8"]
FLAGS += ["--steps", "1000", "--noise-schedule", "linear", "--learn-sigma"]


def small(seed=0, **changes):
    """A network with weights everywhere, also where training starts from zero."""
    torch.manual_seed(seed)
    model = UNet(**{**SMALL, **changes}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def saved(model, name="model000100.pt"):
    torch.save(model.state_dict(), name)
    return name


def convert(*flags, model="model000100.pt"):
    return cli.main(["convert", "--model", model, "--out", "out", *flags])


def refused(capsys, *flags, **kwargs):
    """The one line that is printed where nothing is written."""
    before = sorted(Path().iterdir())
    assert convert(*flags, **kwargs) == 2
    assert sorted(Path().iterdir()) == before
    message = capsys.readouterr().err.strip()
    assert message.startswith("fastdiff convert: error: ") and "\n" not in message
    return message

"""What the README and the pages in docs/ show: their fenced blocks, run and parsed."""

import re
import shlex
from pathlib import Path

import torch

from fastdiff.cli import build_parser
from paths import ROOT


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language ("" for those that name none)."""
    fenced = (ROOT / page).read_text().split("```")[1::2]
    return [text for first, _, text in (b.partition("\n") for b in fenced) if first == language]


def smaller(example: str, **changes: object) -> str:
    """The example with other values for these arguments, each of which it has."""
    for name, value in changes.items():
        example, count = re.subn(rf"\b{name}=[\w.]+", f"{name}={value}", example)
        assert count, name
    return example


def run(page: str, example: str, **names: object) -> dict:
    """The names after an example has run among these."""
    exec(compile(example, page, "exec"), names)
    return names


def save_pipeline(folder: Path) -> None:
    """A small DDIMPipeline with random weights, as diffusers saves it."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
    )
    # The usual schedule makes chaos of a random network's ε (test_diffusers_pipelines.py).
    scheduler = diffusers.DDIMScheduler(beta_end=0.004)
    diffusers.DDIMPipeline(unet, scheduler).save_pretrained(folder)


def parse_commands(page: str) -> int:
    """How many commands of fastdiff stand in the page; argparse has taken all of them."""
    words = [shlex.split(line) for block in blocks(page, "") for line in block.splitlines()]
    commands = [line for line in words if line[:1] in (["fastdiff"], ["torchrun"])]
    for command in commands:
        build_parser().parse_args(command[command.index("fastdiff") + 1 :])
    return len(commands)

"""Where the parameters of fastdiff's U-Net are in diffusers' ``UNet2DModel``."""

from collections.abc import Iterator

from torch import nn

from fastdiff.models.blocks import AttentionBlock, ResBlock
from fastdiff.models.resampling import Downsample, Upsample
from fastdiff.models.unet import UNet

# Modules of ``UNet2DModel`` -> fastdiff's; those of the levels are in ``_block_names``.
MODULES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
PARTS: dict[type[nn.Module], dict[str, str]] = {
    ResBlock: {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    },
    AttentionBlock: {
        "group_norm": "norm",
        "to_q": "qkv",
        "to_k": "qkv",
        "to_v": "qkv",
        "to_out.0": "proj_out",
    },
    Downsample: {"conv": "op"},
    Upsample: {"conv": "conv"},
}


def module_names(model: UNet) -> dict[str, list[str]]:
    """Each module with weights -> the same in diffusers: three layers for a qkv projection."""
    modules = dict(model.named_modules())
    names: dict[str, list[str]] = {}
    for theirs, ours in _block_names(model):
        block = modules.get(ours)  # None: a network without classes
        parts = PARTS.get(type(block)) if block is not None else None
        if parts is None:
            names[ours] = [theirs]
            continue
        for their_part, part in parts.items():
            names.setdefault(f"{ours}.{part}", []).append(f"{theirs}.{their_part}")
    return names


def _block_names(model: UNet) -> Iterator[tuple[str, str]]:
    """(name in diffusers, name here) of each block, and of each layer outside of them."""
    yield from MODULES.items()
    # Both ways num_res_blocks + 1 to a level: down, the last one is what halves the image.
    per_level = model.config["num_res_blocks"] + 1
    for way, name, first in (("down", "input_blocks", 1), ("up", "output_blocks", 0)):
        for i, block in enumerate(list(model.get_submodule(name).children())[first:]):
            level, place = divmod(i, per_level)
            for j, layer in enumerate(block.children()):
                part = f"{way}samplers.0"
                if isinstance(layer, AttentionBlock):
                    part = f"attentions.{place}"
                elif isinstance(layer, ResBlock) and layer.resample is None:
                    part = f"resnets.{place}"
                yield f"{way}_blocks.{level}.{part}", f"{name}.{first + i}.{j}"

"""The fields of ``UNet2DModel``'s config.json as arguments of fastdiff's U-Net, and back."""

from collections.abc import Mapping
from typing import Any

from fastdiff.errors import InputError
from fastdiff.models.blocks import AttentionBlock
from fastdiff.models.unet import UNet
from fastdiff.models.unet_config import multiplier

CLASS = "UNet2DModel"
# Every field of a config.json, with the value of one that is left out.
FIELDS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
# Fields that are no part of the network, beside those that begin with "_", diffusers' own notes.
BOOKKEEPING = {
    # EMAModel.save_pretrained writes its own state beside the averaged network's fields.
    *("decay", "min_decay", "inv_gamma", "power", "use_ema_warmup"),
    *("optimization_step", "update_after_step", "collected_params"),
    # How it is trained and what the weights' dtype was; the file of weights shows that itself.
    *("gradient_checkpointing", "torch_dtype", "dtype"),
}
# Fields that are arguments of fastdiff's U-Net.
ARGUMENTS = {
    "sample_size": "image_size",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "layers_per_block": "num_res_blocks",
    "dropout": "dropout",
    "num_class_embeds": "num_classes",
    "norm_num_groups": "norm_num_groups",
    "norm_eps": "norm_eps",
    "flip_sin_to_cos": "flip_sin_to_cos",
    "freq_shift": "freq_shift",
    "downsample_padding": "downsample_padding",
}
# Fields that fastdiff's U-Net has one meaning for, and the values that have it.
ONLY: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "downsample_type": ("conv", "resnet", None),
    "upsample_type": ("conv", "resnet", None),
}
# Block type -> (attention, how it resamples; None: as downsample_type or upsample_type says).
BLOCK_TYPES: dict[str, dict[str, tuple[bool, str | None]]] = {
    "down": {
        "DownBlock2D": (False, "conv"),
        "ResnetDownsampleBlock2D": (False, "resnet"),
        "AttnDownBlock2D": (True, None),
    },
    "up": {
        "UpBlock2D": (False, "conv"),
        "ResnetUpsampleBlock2D": (False, "resnet"),
        "AttnUpBlock2D": (True, None),
    },
}


def unet_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``UNet`` from the fields of a config.json.

    Raises:
        InputError: a field that fastdiff's U-Net cannot follow.
    """
    for field, value in config.items():
        known = field in FIELDS or field in BOOKKEEPING or field.startswith("_")
        if not known and value is not None:
            raise InputError(
                f"{field}={value!r:.80} is unknown here; remove it if it has no effect"
            )
    config = {**FIELDS, **config}
    for field, values in ONLY.items():
        if config[field] not in values:
            raise _refused(config, field, " or ".join(map(repr, values)))
    widths = config["block_out_channels"]
    if not isinstance(widths, list) or not widths or not all(map(_is_count, widths)):
        raise _refused(config, "block_out_channels", "a list of numbers of channels")
    groups, head_dim = config["norm_num_groups"], config["attention_head_dim"]
    if not _is_count(groups) or any(width % groups for width in widths):
        raise _refused(config, "norm_num_groups", f"a divisor of the channels {widths}")
    if config["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise _refused(
            config, "time_embedding_dim", f"{4 * widths[0]}, 4 × the first level's width"
        )
    attention, resampling = _levels(config, len(widths))
    film = config["resnet_time_scale_shift"] == "scale_shift"
    # None is norm_num_groups, but with scale_shift no norm at all.
    if config["attn_norm_num_groups"] not in ((groups,) if film else (groups, None)):
        raise _refused(config, "attn_norm_num_groups", f"{groups}, its norm_num_groups")
    attended = [width for width, has in zip(widths, attention, strict=True) if has] + widths[-1:]
    if head_dim is not None and (not _is_count(head_dim) or any(w % head_dim for w in attended)):
        raise _refused(config, "attention_head_dim", f"null or a divisor of {attended}")
    return {
        **{argument: config[field] for field, argument in ARGUMENTS.items()},
        "model_channels": widths[0],
        "channel_mult": [multiplier(width, widths[0]) for width in widths],
        "attention_resolutions": [2**level for level, has in enumerate(attention) if has],
        "resblock_updown": resampling == "resnet",
        "use_scale_shift_norm": film,
        "num_head_channels": -1 if head_dim is None else head_dim,
        "use_new_attention_order": True,
    }


def diffusers_config(model: UNet) -> dict[str, Any]:
    """The fields of a config.json that describe ``model``.

    Raises:
        InputError: an argument that ``UNet2DModel`` cannot follow.
    """
    config = model.config
    for argument, only in (("dims", 2), ("super_res", False), ("null_class", False)):
        if config[argument] != only:
            raise _unsaved(config, argument, f"has only {only!r}")
    widths = [int(mult * model.model_channels) for mult in config["channel_mult"]]
    if widths[0] != model.model_channels:
        raise _unsaved(config, "channel_mult", "embeds timesteps at the first level's width")
    resnet = config["resblock_updown"]
    if not config["conv_resample"] and not resnet and len(widths) > 1:
        raise _unsaved(config, "conv_resample", "has only True")
    groups = config["norm_num_groups"]
    if any(width % groups for width in widths):
        raise _unsaved(config, "norm_num_groups", f"needs a divisor of the channels {widths}")
    film = config["use_scale_shift_norm"]
    attention = [2**level in config["attention_resolutions"] for level in range(len(widths))]
    down = {True: "AttnDownBlock2D", False: "ResnetDownsampleBlock2D" if resnet else "DownBlock2D"}
    up = {True: "AttnUpBlock2D", False: "ResnetUpsampleBlock2D" if resnet else "UpBlock2D"}
    return {
        **FIELDS,
        **{field: config[argument] for field, argument in ARGUMENTS.items()},
        "block_out_channels": widths,
        "down_block_types": [down[has] for has in attention],
        "up_block_types": [up[has] for has in reversed(attention)],
        "downsample_type": "resnet" if resnet else "conv",
        "upsample_type": "resnet" if resnet else "conv",
        "attention_head_dim": _head_dim(model),
        "attn_norm_num_groups": groups if film else None,
        "resnet_time_scale_shift": "scale_shift" if film else "default",
    }


def _levels(config: Mapping[str, Any], count: int) -> tuple[list[bool], str]:
    """(whether there is attention, for each level from the top; how the network resamples)."""
    kinds = {}
    for way, types in BLOCK_TYPES.items():
        field, otherwise = f"{way}_block_types", config[f"{way}sample_type"] or "conv"
        names = config[field]
        if not isinstance(names, list) or len(names) != count:
            raise _refused(config, field, f"a list of {count}, one for each of block_out_channels")
        names = [str(name).removeprefix("UNetRes") for name in names]  # the early, longer names
        if not set(names) <= set(types):
            raise _refused(config, field, f"only {', '.join(types)}")
        blocks = [types[name] for name in names]
        kinds[way] = [(has, resampling or otherwise) for has, resampling in blocks]
    attention = [has for has, _ in kinds["down"]]
    if [has for has, _ in reversed(kinds["up"])] != attention:
        raise _refused(config, "up_block_types", "attention at the same levels as on the way down")
    # The last block of each way does not resample.
    resampling = {kind for way in kinds.values() for _, kind in way[:-1]} or {"conv"}
    if len(resampling) > 1:
        names = [f"{way}{field}" for way in kinds for field in ("_block_types", "sample_type")]
        raise InputError(
            f"{', '.join(names)}: some levels resample by conv and some by resnet; "
            "fastdiff's U-Net needs all alike"
        )
    return attention, resampling.pop()


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _head_dim(model: UNet) -> int | None:
    """attention_head_dim: None for one head."""
    blocks = [block for block in model.modules() if isinstance(block, AttentionBlock)]
    if all(block.num_heads == 1 for block in blocks):
        return None
    head_dims = {block.qkv.in_channels // block.num_heads for block in blocks}
    if len(head_dims) > 1:
        upsample = model.config["num_heads_upsample"] != -1
        argument = "num_heads_upsample" if upsample else "num_heads"
        raise _unsaved(model.config, argument, f"has heads of one width, not {sorted(head_dims)}")
    return head_dims.pop()


def _refused(config: Mapping[str, Any], field: str, expected: str) -> InputError:
    return InputError(f"{field}={config[field]!r:.80}; fastdiff's U-Net needs {expected}")


def _unsaved(config: Mapping[str, Any], argument: str, fact: str) -> InputError:
    return InputError(
        f"cannot save a UNet with {argument}={config[argument]!r} in diffusers' format: "
        f"{CLASS} {fact}"
    )

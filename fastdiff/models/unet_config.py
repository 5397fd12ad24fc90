"""Which arguments of the U-Net, and of the half that goes down, fit together."""

import math
from typing import Any

from fastdiff.errors import InputError
from fastdiff.models.resampling import CONVOLUTIONS

COUNTS = (
    "in_channels",
    "model_channels",
    "out_channels",
    "num_res_blocks",
    "num_heads",
)


def multiplier(width: int, model_channels: int) -> int | float:
    """A member m of channel_mult: int(m·model_channels) = width."""
    if width % model_channels == 0:
        return width // model_channels
    m = width / model_channels
    return m if int(m * model_channels) == width else math.nextafter(m, math.inf)


def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a network as JSON gives them back."""
    size = arguments["image_size"]
    return {
        **arguments,
        "attention_resolutions": sorted(int(ds) for ds in arguments["attention_resolutions"]),
        "channel_mult": list(arguments["channel_mult"]),
        "image_size": size if size is None or isinstance(size, int) else list(size),
    }


def check_config(config: dict[str, Any]) -> None:
    """Check the U-Net's arguments, by name.

    Raises:
        InputError: one that is out of range or does not fit another.
    """
    check_encoder(config, "UNet")
    check_count(config, "norm_num_groups", "UNet")
    eps, shift = config["norm_eps"], config["freq_shift"]
    if not eps > 0:
        raise InputError(f"UNet: norm_eps={eps!r}; expected more than 0")
    if shift and shift >= config["model_channels"] // 2:
        raise InputError(
            f"UNet: freq_shift={shift!r}; expected less than half of "
            f"model_channels={config['model_channels']}"
        )
    if config["downsample_padding"] not in (0, 1):
        raise InputError(
            f"UNet: downsample_padding={config['downsample_padding']!r}; expected 0 or 1"
        )
    if config["num_classes"] is not None and config["num_classes"] < 1:
        raise InputError(f"UNet: num_classes={config['num_classes']}; expected None or at least 1")
    if config["null_class"] and config["num_classes"] is None:
        raise InputError("UNet: null_class=True needs num_classes")
    if config["noise_cond"] and not config["super_res"]:
        raise InputError("UNet: noise_cond=True needs super_res=True")


def check_encoder(config: dict[str, Any], kind: str) -> None:
    """Check the arguments of the way down; ``kind``: what messages call the network.

    Raises:
        InputError: one that is out of range or does not fit another.
    """
    if config["dims"] not in CONVOLUTIONS:
        raise InputError(f"{kind}: dims={config['dims']!r}; expected 1, 2 or 3")
    for name in COUNTS:
        check_count(config, name, kind)
    for name in ("num_head_channels", "num_heads_upsample"):
        if config[name] != -1 and config[name] < 1:
            raise InputError(f"{kind}: {name}={config[name]!r}; expected −1 or at least 1")
    multipliers = config["channel_mult"]
    if not multipliers or min(int(m * config["model_channels"]) for m in multipliers) < 1:
        raise InputError(
            f"{kind}: channel_mult={multipliers!r}; "
            "expected at least one level, each of at least 1 channel"
        )
    if not 0 <= config["dropout"] < 1:
        raise InputError(f"{kind}: dropout={config['dropout']!r}; expected 0 ≤ dropout < 1")
    factors = {2**level for level in range(len(multipliers))}
    unreachable = set(config["attention_resolutions"]) - factors
    if unreachable:
        raise InputError(
            f"{kind}: attention_resolutions={config['attention_resolutions']} are downsampling "
            f"factors; {len(multipliers)} levels have {sorted(factors)}, not {sorted(unreachable)}"
        )


def check_count(config: dict[str, Any], name: str, kind: str) -> None:
    """InputError unless the argument of that name is an integer of at least 1."""
    if not isinstance(config[name], int) or config[name] < 1:
        raise InputError(f"{kind}: {name}={config[name]!r}; expected an integer of at least 1")

"""Weights released with improved-diffusion and guided-diffusion."""

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastdiff.checkpoints.published_file import read_published, state_in
from fastdiff.checkpoints.weights import load_weights
from fastdiff.errors import InputError
from fastdiff.models import presets
from fastdiff.models.encoder_unet import EncoderUNet
from fastdiff.models.unet import UNet
from fastdiff.models.unet_config import multiplier


def load_published(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    preset: str | None = None,
    key: str = "",
    strip: str = "",
    **arguments: Any,
) -> UNet | EncoderUNet:
    """A network with the weights of a published ``.pt`` state dict, in eval mode.

    Such a file does not say which network it belongs to: name a preset, or give the arguments of
    ``UNet``, or both (the arguments win). A classifier's preset makes an ``EncoderUNet``. Attention
    order and number of heads leave no trace in the shapes, so a wrong one loads without an error
    and computes nonsense.

    Args:
        source: the file, or the state dict itself.
        preset: a name from ``presets``.
        key: where in the file's dictionaries the state dict lies, such as "state_dict".
        strip: what stands before its names, such as "module."; names without it are left out.

    Raises:
        InputError: not such a file, or weights that do not fit the network.
    """
    if isinstance(source, Mapping):
        name = "source"
        state = state_in(source, name, key=key, strip=strip)
    else:
        name = os.fspath(source)
        state = read_published(source, key=key, strip=strip)
    known = presets.get(preset) if preset else None
    arguments = {**(known.model if known else {}), **arguments}
    classifies = known is not None and known.network == EncoderUNet.kind
    model = EncoderUNet(**arguments) if classifies else UNet(**arguments)
    load_weights(model, state, name)
    return model.eval()


def is_classifier(state: Mapping[str, Tensor]) -> bool:
    """Whether a published state dict is a classifier's: one of a network without a way up."""
    parts = {name.partition(".")[0] for name in state}
    known = {"input_blocks.0.0.weight", "middle_block.1.qkv.weight"} <= state.keys()
    return known and "out" in parts and "output_blocks" not in parts


def classifier_config_from_state(
    state: Mapping[str, Tensor], preset: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of ``EncoderUNet`` for a published classifier.

    Its names do not show where it halves the image, where residual blocks do so; ``preset`` knows
    it, and all but the channels and the classes.
    """
    *_, last = (weight for name, weight in state.items() if name.startswith("out."))
    channels = state["input_blocks.0.0.weight"].shape[1]
    return {**preset, "in_channels": channels, "out_channels": last.shape[0]}


_STRANGER = "not the state dict of an improved-diffusion or guided-diffusion U-Net"


def unet_config_from_state(
    state: Mapping[str, Tensor], *, super_res: bool | None = None
) -> dict[str, Any]:
    """The arguments of ``UNet`` that a published state dict shows by its names and shapes.

    ``in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions,
    channel_mult, conv_resample, dims, num_classes, use_scale_shift_norm, resblock_updown,
    super_res``. What leaves no trace is not among them: the number of heads and the order of qkv
    rows, dropout, the image size. Where nothing is resampled, or blocks do it, ``conv_resample`` is
    True, its default.

    Args:
        super_res: whether half of the input channels are the low-resolution image's. Needed only
            where the shapes fit both: six channels in and out are RGB and a learned variance in
            a super-resolution network, or one for images of six channels.

    Raises:
        InputError: not such a state dict, or ``super_res`` missing or impossible.
    """

    def shape(name: str, dims: int = 1) -> tuple[int, ...]:
        sizes = tuple(state[name].shape) if name in state else ()
        if len(sizes) < dims or 0 in sizes:
            came = f"its {name} is {sizes}" if name in state else f"it has no {name}"
            raise InputError(f"{_STRANGER}: {came}")
        return sizes

    shape("middle_block.1.qkv.weight")
    model_channels = shape("time_embed.0.weight", 2)[1]
    first_channels, *kernel = shape("input_blocks.0.0.weight", 3)[1:]
    out_channels = shape("out.2.weight")[0]
    super_res = _is_super_res(first_channels, out_channels, super_res)

    # Down and up alike a level is num_res_blocks + 1 blocks; downwards the last one resamples.
    blocks = 1 + max(
        (_number(name) for name in state if name.startswith("output_blocks.")), default=-1
    )
    convolved = [i for i in range(1, blocks) if f"input_blocks.{i}.0.op.weight" in state]
    pooled = [
        i
        for i in range(1, blocks)
        if i not in convolved and f"input_blocks.{i}.0.in_layers.0.weight" not in state
    ]
    inside = [  # a second residual block, which resamples
        i + 1
        for i in range(blocks)
        if any(f"output_blocks.{i}.{j}.in_layers.0.weight" in state for j in (1, 2))
    ]
    each = min(convolved + pooled + inside, default=blocks)
    if each < 2 or blocks % each:
        raise InputError(f"{_STRANGER}: its {blocks} output blocks are no levels of {each}")
    firsts = range(1, blocks + 1, each)  # each level's first block
    widths = [shape(f"input_blocks.{i}.0.out_layers.3.weight")[0] for i in firsts]
    has_attention = [f"input_blocks.{i}.1.qkv.weight" in state for i in firsts]
    return {
        "in_channels": first_channels // 2 if super_res else first_channels,
        "model_channels": model_channels,
        "out_channels": out_channels,
        "num_res_blocks": each - 1,
        "attention_resolutions": [2**level for level, has in enumerate(has_attention) if has],
        "channel_mult": [multiplier(width, model_channels) for width in widths],
        "conv_resample": not pooled,
        "dims": len(kernel),
        "num_classes": shape("label_emb.weight")[0] if "label_emb.weight" in state else None,
        "use_scale_shift_norm": shape("input_blocks.1.0.emb_layers.1.weight")[0] == 2 * widths[0],
        "resblock_updown": bool(inside),
        "super_res": super_res,
    }


def _is_super_res(channels: int, out_channels: int, given: bool | None) -> bool:
    """A network answers as many channels as its images have, or twice as many."""
    fits = {
        False: out_channels in (channels, 2 * channels),
        True: channels % 2 == 0 and out_channels in (channels // 2, channels),
    }
    possible = [kind for kind, fit in fits.items() if fit]
    if given is not None and given not in possible and possible:
        raise InputError(
            f"super_res={given}, but the network takes {channels} channels and answers "
            f"{out_channels}"
        )
    if given is None and len(possible) != 1:
        raise InputError(
            f"the network takes {channels} channels and answers {out_channels}: say whether half "
            "of them are a low-resolution image's (super_res)"
        )
    return possible[0] if given is None else given


def _number(name: str) -> int:
    """Of the block that a name such as output_blocks.11.0.norm.weight is in; -1 if it has none."""
    number = name.split(".")[1]
    return int(number) if number.isdecimal() and len(number) < 6 else -1

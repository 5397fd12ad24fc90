"""U-Nets in the format of diffusers' ``UNet2DModel``, without diffusers.

A directory of config.json, which holds the constructor's fields, and
diffusion_pytorch_model.safetensors. ``fastdiff.load`` reads it too.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.config import check_described
from fastdiff.checkpoints.weights import (
    CONFIG_FILE,
    build,
    check_state,
    check_target,
    load_json,
    load_tensors,
    write_directory,
)
from fastdiff.errors import InputError
from fastdiff.models.blocks import AttentionBlock
from fastdiff.models.readers.diffusers.config import CLASS, diffusers_config, unet_arguments
from fastdiff.models.readers.diffusers.names import module_names
from fastdiff.models.unet import UNet
from fastdiff.models.wrappers import plain_state, unwrapped

WEIGHTS = "diffusion_pytorch_model"

# Parts of attention had other names in the first releases.
OLD_PARTS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_unet(directory: str | os.PathLike[str]) -> UNet:
    """The network of a diffusers ``UNet2DModel`` directory, in eval mode.

    Its weights may be sharded, or of a variant (fp16, bf16) if there are no others.

    Args:
        directory: the network's own, or that of a pipeline, which has it in ``unet/``. An average
            that a training script wrote beside that is a network's own directory: ``unet_ema/``.

    Raises:
        InputError: no such directory, a damaged file, or a network that fastdiff's U-Net cannot be;
            the message names the file and the field.
    """
    path = Path(os.path.abspath(directory))
    folder = unet_folder(path)
    if folder is None:
        raise InputError(
            f"{path} is not a diffusers network: no {CONFIG_FILE} that names its class"
        )
    config = load_json(folder, "config")
    if config["_class_name"] != CLASS:
        raise InputError(
            f"{folder / CONFIG_FILE} is a {config['_class_name']!r:.80}'s; fastdiff reads {CLASS}"
        )
    model = build(folder, "network", lambda: UNet(**unet_arguments(config)))
    state, source = _read_weights(folder)
    check_state(diffusers_state(model, model.state_dict()), state, source)
    model.load_state_dict(unet_state(model, state))
    return model.eval()


def save_unet(directory: str | os.PathLike[str], model: UNet) -> Path:
    """Write a directory that diffusers' ``UNet2DModel.from_pretrained`` reads, or nothing.

    Args:
        directory: its parent is made if missing; an older save of this kind is replaced.

    Returns:
        The directory.

    Raises:
        OSError: the disk is full or not writable; nothing has changed.
        InputError: ``directory`` is a file or a folder of other things, or the network is none that
            ``UNet2DModel`` can be; nothing has changed.
    """
    target = Path(os.path.abspath(directory))
    check_target(target, _foreign_entries)
    network = unwrapped(model)
    if not isinstance(network, UNet):
        raise InputError(f"save_unet: cannot save a {type(network).__name__}; pass the UNet itself")
    config = {"_class_name": CLASS, **diffusers_config(network)}
    state = plain_state(network)
    check_described(network, network.config, state)
    write_directory(target, {WEIGHTS: diffusers_state(network, state)}, {"config": config})
    return target


def _foreign_entries(path: Path) -> list[str]:
    """The entries of a directory that ``save_unet`` did not write: all of them, or none."""
    names = sorted(entry.name for entry in path.iterdir())
    ours = names == [CONFIG_FILE, f"{WEIGHTS}.safetensors"] and unet_folder(path) == path
    return [] if ours and load_json(path, "config")["_class_name"] == CLASS else names


def unet_folder(path: Path) -> Path | None:
    """Where a diffusers network lies: here or in ``unet/``; None if here is something else."""
    for folder in (path, path / "unet"):
        if (folder / CONFIG_FILE).is_file():
            config = load_json(folder, "config")
            return folder if isinstance(config, dict) and "_class_name" in config else None
    return None


# Its weights


def diffusers_state(model: UNet, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of ``model`` with the names and shapes of ``UNet2DModel``."""
    modules, renamed = module_names(model), {}
    for key, tensor in state.items():
        ours, _, parameter = key.rpartition(".")
        if tensor.dim() == 3:  # a 1×1 Conv1d here is a Linear there
            tensor = tensor.squeeze(-1)
        if ours.endswith(".qkv"):
            block = model.get_submodule(ours.removesuffix(".qkv"))
            parts = zip(modules[ours], _query_key_value(tensor, block), strict=True)
            renamed.update({f"{theirs}.{parameter}": rows for theirs, rows in parts})
        else:
            renamed[f"{modules[ours][0]}.{parameter}"] = tensor
    return renamed


def unet_state(model: UNet, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``diffusers_state``, for a ``model`` with ``use_new_attention_order``."""
    modules, renamed = module_names(model), {}
    for key, tensor in model.state_dict().items():
        ours, _, parameter = key.rpartition(".")
        rows = torch.cat([state[f"{theirs}.{parameter}"] for theirs in modules[ours]])
        renamed[key] = rows.view(tensor.shape)
    return renamed


def _query_key_value(rows: Tensor, block: nn.Module) -> list[Tensor]:
    """(3C, ...) rows of a packed projection -> three of (C, ...)."""
    assert isinstance(block, AttentionBlock)
    heads = block.num_heads if block.order == "heads_first" else 1
    parts = rows.unflatten(0, (heads, 3, -1)).transpose(0, 1)
    # Copies: safetensors refuses tensors that share memory.
    return [part.flatten(0, 1).clone() for part in parts]


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """(the tensors, the file that holds or lists them)."""
    for variant in ("", ".fp16", ".bf16"):
        stem, index = f"{WEIGHTS}{variant}", f"{WEIGHTS}.safetensors.index{variant}"
        if (folder / f"{stem}.safetensors").is_file():
            return _renamed(load_tensors(folder, stem)), folder / f"{stem}.safetensors"
        if (folder / f"{index}.json").is_file():
            state = {}
            for shard in _shards(folder, index):
                state.update(load_tensors(folder, shard))
            return _renamed(state), folder / f"{index}.json"
    reason = f"{folder} has no {WEIGHTS}.safetensors"
    others = sorted(path.name for path in folder.glob("diffusion_*_model*"))
    if others:  # pickles, other variants, JAX
        reason += f" but a {others[0]}; let diffusers save it again (save_pretrained)"
    raise InputError(reason)


def _shards(folder: Path, index: str) -> list[str]:
    """The stems of the files that an index lists."""
    listed = load_json(folder, index)
    places = listed.get("weight_map") if isinstance(listed, dict) else None
    names = set(map(str, places.values())) if isinstance(places, dict) else set()
    if not names or not all(re.fullmatch(rf"{WEIGHTS}[\w.-]*\.safetensors", n) for n in names):
        raise InputError(f"{folder / index}.json has no weight_map to {WEIGHTS}*.safetensors files")
    return sorted(name.removesuffix(".safetensors") for name in names)


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with the present names of attention's parts."""
    renamed = {}
    for key, tensor in state.items():
        module, _, parameter = key.rpartition(".")
        block, _, part = module.rpartition(".")
        renamed[f"{block}.{OLD_PARTS[part]}.{parameter}" if part in OLD_PARTS else key] = tensor
    return renamed

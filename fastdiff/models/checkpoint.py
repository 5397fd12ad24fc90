"""Checkpoints: directories that describe themselves, written so that no crash spoils an older one.

- config.json: {"format", "model", "diffusion", "step", "info", "ema", "averages"}
- model.safetensors: the network's state_dict
- ema_<rate>.safetensors: one file per average
- whatever the caller adds
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.create import process_from_config
from fastdiff.errors import InputError
from fastdiff.models.diffusers_format import load_unet, unet_folder
from fastdiff.models.diffusers_process import load_process
from fastdiff.models.ema import EMA, rate_name
from fastdiff.models.files import (
    CONFIG_FILE,
    build,
    check_target,
    load_json,
    load_tensors,
    load_weights,
    previous_directory,
    replace_directory,
)
from fastdiff.models.run_directory import identify
from fastdiff.models.unet import UNet

FORMAT = 1
MODEL_FILE = "model.safetensors"
# What config.json holds beside the format.
KINDS = {"model": dict, "diffusion": dict | None, "step": int | None, "info": dict, "ema": list}


@dataclass
class Checkpoint:
    """What ``load`` found.

    Attributes:
        model: the network in eval mode, holding the weights asked for.
        diffusion: the process it was trained with, or None if none was saved.
        step: optimizer steps taken, or None.
        info: facts about the data: image_size, channels, num_classes, class_names, ...
        config: the whole of config.json; of a diffusers network, as ``save`` would write it.
        path: the directory.
        weights: ``"model"`` or the rate of the average that was loaded.
    """

    model: UNet
    diffusion: Any
    step: int | None
    info: dict[str, Any]
    config: dict[str, Any]
    path: Path
    weights: str = "model"
    ema_rates: list[str] = field(default_factory=list)


def save(
    directory: str | os.PathLike[str],
    model: nn.Module,
    *,
    diffusion: Any = None,
    ema: EMA | None = None,
    step: int | None = None,
    info: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    extra_json: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint directory, all of it or nothing.

    An older checkpoint of that name stays until the new one is complete. What a killed save left
    behind is removed by the next one.

    Args:
        directory: its parent is made if missing.
        model: a ``UNet`` (anything with ``config`` and ``state_dict``).
        diffusion: anything with ``to_config()``.
        ema: all of its rates are saved.
        step, info: recorded in config.json.
        extra_tensors: file name without ``.safetensors`` -> tensors by name; see ``load_tensors``.
        extra_json: file name without ``.json`` -> a JSON value; see ``load_json``.

    Returns:
        The directory.

    Raises:
        OSError: the disk is full or not writable; nothing has changed.
        InputError: ``directory`` is a file or a folder of other things, the model has no config, or
            a value has no JSON form; nothing has changed.
    """
    target = Path(os.path.abspath(directory))
    # A run keeps more in a checkpoint than these two; other libraries use these names too.
    check_target(
        target,
        lambda names: names >= {CONFIG_FILE, MODEL_FILE} and identify(target).kind == "checkpoint",
    )
    if not isinstance(getattr(model, "config", None), dict):
        raise InputError(
            f"cannot save a {type(model).__name__}: it has no config, which a checkpoint needs to "
            "describe itself; pass the UNet itself, not a wrapper"
        )
    rates = ema.rates if ema is not None else []
    documents = {
        "config": {
            "format": FORMAT,
            "model": model.config,
            "diffusion": None if diffusion is None else diffusion.to_config(),
            "step": step,
            "info": dict(info or {}),
            "ema": rates,
            "averages": None if ema is None else {"updates": ema.updates, "warmup": ema.warmup},
        },
        **(extra_json or {}),
    }
    tensors: dict[str, Mapping[str, Tensor]] = {
        "model": model.state_dict(),
        **(extra_tensors or {}),
    }
    for rate in rates:
        assert ema is not None
        tensors[f"ema_{rate}"] = ema.state_dict(rate)

    replace_directory(target, tensors, documents)
    return target


def load(
    directory: str | os.PathLike[str],
    *,
    weights: str | float = "ema",
    device: str | torch.device = "cpu",
) -> Checkpoint:
    """Read a checkpoint directory and build what it describes.

    Args:
        directory: what ``save`` wrote; or a diffusers ``UNet2DModel`` or the pipeline around one,
            whose weights are ``"model"`` and whose process is the pipeline's scheduler's: its
            betas, prediction and variance. A directory of the network alone has no process.
        weights: ``"model"`` for the trained weights, a rate such as ``"0.9999"`` for that average,
            ``"ema"`` for the average with the highest rate (the trained weights if there is none).
        device: where the network goes.

    Raises:
        InputError: not a checkpoint, an unknown average, a damaged file, weights of another
            network, a scheduler of another kind of process; the message names the file.
    """
    path = Path(os.path.abspath(directory))
    if not path.exists() and previous_directory(path).is_dir():
        # A save was killed between its two renames; the next one recovers.
        path = previous_directory(path)
    diffusers_folder = unet_folder(path)
    if diffusers_folder is not None:
        name, _ = _choose_weights(path, [], weights)
        model = load_unet(diffusers_folder).to(device)
        diffusion = load_process(path)
        config = {**_nothing_saved(), "format": FORMAT, "model": model.config}
        config["diffusion"] = None if diffusion is None else diffusion.to_config()
        return Checkpoint(model, diffusion, None, {}, config, path, name)
    config = _read_config(path)
    rates = build(path, "ema", lambda: [rate_name(rate) for rate in config["ema"]])
    name, stem = _choose_weights(path, rates, weights)
    state = load_tensors(path, stem)

    model = build(path, "model", lambda: UNet(**config["model"]))
    load_weights(model, state, path / f"{stem}.safetensors")
    diffusion = None
    if config["diffusion"] is not None:
        diffusion = build(path, "diffusion", lambda: process_from_config(config["diffusion"]))
    return Checkpoint(
        model=model.to(device).eval(),
        diffusion=diffusion,
        step=config["step"],
        info=config["info"],
        config=config,
        path=path,
        weights=name,
        ema_rates=rates,
    )


def _nothing_saved() -> dict[str, Any]:
    return {"model": None, "diffusion": None, "step": None, "info": {}, "ema": []}


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise InputError(f"{path} is not a checkpoint directory: there is no such directory")
    if not (path / CONFIG_FILE).is_file():
        raise InputError(f"{path} is not a checkpoint directory: it has no {CONFIG_FILE}")
    config = load_json(path, "config")
    if not isinstance(config, dict) or "format" not in config:
        raise InputError(f"{path / CONFIG_FILE} is not a fastdiff checkpoint's: it has no format")
    if config["format"] != FORMAT:
        raise InputError(
            f"{path / CONFIG_FILE} has format {config['format']!r}; this version reads {FORMAT}"
        )
    config = {**_nothing_saved(), **config}
    for part, kinds in KINDS.items():
        if not isinstance(config[part], kinds):
            raise InputError(f"{path / CONFIG_FILE}: its {part} cannot be {config[part]!r:.80}")
    return config


def _choose_weights(path: Path, rates: list[str], weights: str | float) -> tuple[str, str]:
    """(name of the weights, file stem)."""
    if weights == "model" or (weights == "ema" and not rates):
        return "model", "model"
    name = max(rates, key=float) if weights == "ema" else str(weights)
    if name not in rates:
        with suppress(InputError):  # "0.90" and 0.9 mean "0.9"; other words are no rates
            name = rate_name(weights)
    if name not in rates:
        there = ", ".join(["model", *rates])
        raise InputError(f"{path} has no weights {name!r}; there are {there}")
    return name, f"ema_{name}"

"""A checkpoint's config.json: read, and held against the weights before anything is written."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastdiff.checkpoints.parts import INDEX
from fastdiff.checkpoints.weights import (
    CONFIG_FILE,
    UNBUILDABLE,
    load_json,
    no_weight,
    state_difference,
    to_json,
)
from fastdiff.errors import InputError, first_line
from fastdiff.models.unet import UNet
from fastdiff.models.valueless import valueless
from fastdiff.process import classification, edm, variance_exploding
from fastdiff.process.classification import NoisyClassification
from fastdiff.process.edm import EDM
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.variance_exploding import VarianceExploding

FORMAT = 1
MODEL_STEM = "model"
# What config.json holds beside the format.
KINDS: dict[str, Any] = {
    **{"model": dict, "diffusion": dict | None, "step": int | None, "info": dict, "ema": list},
    "averages": dict | None,  # {"updates": how often they were, "warmup": whether they warm up}
}
# Names of files that may hold a network's weights and nothing else.
WEIGHT_FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
# Part of a weight's name, with $ at its end -> how to take off what put it there.
REWRITTEN = {
    ".parametrizations.": "take off its parametrizations first "
    "(torch.nn.utils.parametrize.remove_parametrizations)",
    "lora_": "merge its LoRA layers into the weights first (merge_and_unload)",
    ".base_layer.": "merge its adapters into the weights first (merge_and_unload)",
    "_mask$": "make its pruning permanent first (torch.nn.utils.prune.remove)",
    "_g$": "take off its weight norms first (torch.nn.utils.remove_weight_norm)",
    "_u$": "take off its spectral norms first (torch.nn.utils.remove_spectral_norm)",
    "_packed_params": "it has quantized layers; save the network from before",
}


def nothing_saved() -> dict[str, Any]:
    nothing: dict[str, Any] = {
        "model": None,
        "diffusion": None,
        "step": None,
        "info": {},
        "ema": [],
    }
    return {**nothing, "averages": None}


def read_config(path: Path) -> dict[str, Any]:
    """config.json of the checkpoint ``path``, checked. InputError that names the file."""
    if not path.is_dir():
        raise InputError(f"{path} is not a checkpoint directory: there is no such directory")
    if not (path / CONFIG_FILE).is_file():
        raise InputError(
            f"{path} is not a checkpoint directory: it has no {CONFIG_FILE}{_what_it_has(path)}"
        )
    config = load_json(path, "config")
    if not isinstance(config, dict) or "format" not in config:
        other = config.get("model_type") if isinstance(config, dict) else None
        of = "" if other is None else f" (its model_type is {other!r:.80})"
        raise InputError(
            f"{path / CONFIG_FILE} is not a fastdiff checkpoint's: it has no format{of}"
        )
    if config["format"] != FORMAT:
        raise InputError(
            f"{path / CONFIG_FILE} has format {config['format']!r}; this version reads {FORMAT}"
        )
    config = {**nothing_saved(), **config}
    _check_kinds(config, str(path / CONFIG_FILE))
    return config


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is what ``save`` writes."""
    if not (path / CONFIG_FILE).is_file() or not (path / f"{MODEL_STEM}.safetensors").is_file():
        return False
    try:
        read_config(path)
    except InputError:
        return False
    return True


def foreign_entries(path: Path) -> list[str]:
    """The entries of a directory that no ``save`` wrote: all, or what lies among its files."""
    ours = is_checkpoint(path)
    return [entry.name for entry in path.iterdir() if not (ours and _is_ours(entry))]


def _is_ours(entry: Path) -> bool:
    if entry.is_dir():  # of parts.py
        return (entry / f"{INDEX}.json").is_file() and all(map(_is_ours, entry.iterdir()))
    return entry.is_file() and entry.suffix in (".json", ".safetensors")


def check_saved(
    config: Mapping[str, Any],
    network: nn.Module,
    expected: Mapping[str, Tensor],
    averages: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """That ``load`` will read this config, and averages of the weights that it ``expected``.

    Raises:
        InputError: one line that says what does not fit.
    """
    as_read = json.loads(to_json(CONFIG_FILE, config))
    _check_kinds(as_read, f"cannot save {CONFIG_FILE}")
    for rate, average in averages.items():
        difference = state_difference(expected, average)
        if difference is not None:
            raise InputError(
                f"cannot save the average of rate {rate}: it is of another network than the "
                f"{type(network).__name__} beside it: {difference}"
            )
    if as_read["diffusion"] is not None:
        try:
            process_from_config(as_read["diffusion"])
        except UNBUILDABLE as error:
            raise InputError(
                f"cannot save this process: its to_config() gives none ({first_line(error)})"
            ) from error


def check_described(
    network: nn.Module, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights, without values, of the U-Net that ``config`` describes.

    Raises:
        InputError: there is none, or ``state``, the weights of ``network``, has other names or
            shapes, or no values that a file can hold.
    """
    kind = type(network).__name__
    try:
        with valueless():
            described = UNet(**config).state_dict()
    except UNBUILDABLE as error:
        reason = f"its config describes no fastdiff UNet ({first_line(error)})"
        raise InputError(f"cannot save a {kind}: {reason}") from error
    difference = state_difference(described, state)
    if difference is not None:
        raise InputError(
            f"cannot save this {kind}: its weights are not those of the network that its config "
            f"describes: {difference}; {_advice([n for n in state if n not in described])}"
        )
    for name, tensor in state.items():
        unfit = no_weight(tensor)
        if unfit is not None:
            raise InputError(f"cannot save this {kind}: its {name} {unfit}")
    return described


def check_extra_names(names: Collection[str], taken: Collection[str], argument: str) -> None:
    """That extra files lie in the checkpoint's directory and are none of its own."""
    for name in names:
        if name in taken:
            raise InputError(f"{argument}: {name!r} is the name of a file of the checkpoint itself")
        if not name or Path(name).name != name:
            raise InputError(f"{argument}: {name!r} is no file name")


def _what_it_has(path: Path) -> str:
    """The end of a message about a directory without a config.json."""
    if (path / "model_index.json").is_file():
        return ", nor a unet/ as the diffusers pipelines that fastdiff reads"
    files = sorted(entry for entry in path.iterdir() if entry.suffix in WEIGHT_FILES)
    return f"; fastdiff convert --model {files[0]} makes one of weights" if files else ""


def _check_kinds(config: Mapping[str, Any], where: str) -> None:
    for part, kinds in KINDS.items():
        if not isinstance(config[part], kinds):
            raise InputError(f"{where}: its {part} cannot be {config[part]!r:.80}")


def _advice(unknown: list[str]) -> str:
    for part, remedy in REWRITTEN.items():
        if any(part in f"{name}$" for name in unknown):
            return remedy
    return "make the UNet of the arguments that its layers have now, and load the weights into it"


def process_from_config(
    config: dict[str, Any],
) -> GaussianDiffusion | VarianceExploding | EDM | NoisyClassification:
    """The process of any kind, or a classifier's training, whose ``to_config`` gave ``config``.

    InputError for others.
    """
    named = config.get("process") if isinstance(config, dict) else None
    if named == variance_exploding.PROCESS:
        return VarianceExploding.from_config(config)
    if named == edm.PROCESS:
        return EDM.from_config(config)
    if named == classification.PROCESS:
        return NoisyClassification.from_config(config)
    return GaussianDiffusion.from_config(config)  # whose config has no name in it

"""Checkpoints: directories that describe themselves, written so that no crash spoils an older one.

- config.json: {"format", "model", "diffusion", "step", "info", "ema", "averages"}; what "model" is
  stands in network.py
- model.safetensors: the network's state_dict
- ema_<name>.safetensors: one file per average, by its rate or as power-<sigma_rel>
- whatever the caller adds; of what each rank holds a part of, a folder: see parts.py
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.averages import suited_weights
from fastdiff.checkpoints.config import (
    FORMAT,
    MODEL_STEM,
    check_extra_names,
    check_saved,
    foreign_entries,
    nothing_saved,
    process_from_config,
    read_config,
)
from fastdiff.checkpoints.diffusers_scheduler import load_process
from fastdiff.checkpoints.diffusers_unet import load_unet, unet_folder
from fastdiff.checkpoints.network import Given, described, load_state, made
from fastdiff.checkpoints.parts import copied, write_parts
from fastdiff.checkpoints.run_directory import identify, list_checkpoints
from fastdiff.checkpoints.weights import (
    CONFIG_FILE,
    build,
    check_target,
    load_json,
    load_tensors,
    texts_of,
    write_files,
)
from fastdiff.errors import InputError
from fastdiff.files import previous_directory, replacing_directory
from fastdiff.models.ema import EMA, average_name
from fastdiff.models.shards import any_spread, whole
from fastdiff.models.wrappers import plain_name, plain_state, unwrapped
from fastdiff.ranks import ALONE, Ranks

# The last two read what a caller of ``save`` added.
__all__ = ["Checkpoint", "load", "save", "load_json", "load_tensors"]

CHECKPOINTS = "checkpoints"  # where a training run keeps its own


@dataclass
class Checkpoint:
    """What ``load`` found.

    Attributes:
        model: the network in eval mode, holding the weights asked for: a UNet, where no other was
            saved.
        diffusion: the process it was trained with, or None if none was saved.
        step: optimizer steps taken, or None.
        info: facts about the data: image_size, channels, num_classes, class_names, ...
        config: the whole of config.json; of a diffusers network, as ``save`` would write it.
        path: the checkpoint's directory: of a run's, the one inside that was read.
        weights: ``"model"`` or the name of the average that was loaded: its rate, or ``"power-…"``.
        ema_rates: the averages that the checkpoint has, by name.
    """

    model: Any
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

    What is written is first held against the network that its config describes, so ``load`` reads
    it back.

    Args:
        directory: its parent is made if missing.
        model: a ``UNet``; or any module, of which is recorded how it is made again where its class
            can be imported by name and has a ``config`` with a JSON form that gives the same
            weights by ``cls.from_config(config)`` or ``cls(**config)`` (diffusers' networks are
            such), else the weights alone. On its own or in a wrapper: torch.compile's,
            DistributedDataParallel, AveragedModel and their like, whose network is saved. One that
            FSDP2 has spread over ranks is saved by all of them together, and written by rank 0.
        diffusion: anything with ``to_config()``.
        ema: all of its rates are saved.
        step: optimizer steps taken, for config.json.
        info: facts about the data, for config.json.
        extra_tensors: file name without ``.safetensors`` -> tensors by name; see ``load_tensors``.
        extra_json: file name without ``.json`` -> a JSON value; see ``load_json``.

    Returns:
        The directory.

    Raises:
        OSError: the disk is full or not writable; nothing has changed.
        InputError: ``directory`` is a file or a folder of other things, the UNet has other weights
            than its config describes, a weight has no values or a form that no file holds, the
            averages are another model's, an extra file has the name of one of the checkpoint's, or
            a value has no JSON form; nothing has changed.
    """
    prepared = prepare(
        directory,
        model,
        diffusion=diffusion,
        ema=ema,
        step=step,
        info=info,
        extra_tensors=extra_tensors,
        extra_json=extra_json,
    )
    # What is spread has been gathered by all ranks; one of them writes it.
    if not any_spread(unwrapped(model).parameters()) or torch.distributed.get_rank() == 0:
        prepared.write()
    return prepared.target


@dataclass(frozen=True)
class Prepared:
    """A checkpoint that has been checked, and has only to be written.

    Attributes:
        tensors, texts: by the names of their files, whole: rank 0's alone are written.
        parts: by the names of their folders, what each of ``ranks`` holds a part of.
    """

    target: Path
    tensors: Mapping[str, Mapping[str, Tensor]]
    texts: Mapping[str, str]
    parts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    ranks: Ranks = ALONE

    def write(self) -> None:
        """All of it or nothing: a call of all ``ranks``. OSError as :func:`save`."""
        ranks = self.ranks
        with ExitStack() as stack:
            replacing = replacing_directory(self.target)
            folder = ranks.on_first(lambda: stack.enter_context(replacing))
            for name, tensors in self.parts.items():
                ranks.together(partial(write_parts, folder / name, tensors, ranks))
            ranks.on_first(lambda: write_files(folder, self.tensors, self.texts))


def prepare(
    directory: str | os.PathLike[str],
    model: nn.Module,
    *,
    diffusion: Any = None,
    ema: EMA | None = None,
    step: int | None = None,
    info: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    extra_json: Mapping[str, Any] | None = None,
    parts: Mapping[str, Mapping[str, Tensor]] | None = None,
    ranks: Ranks = ALONE,
    copy: bool = False,
) -> Prepared:
    """What :func:`save` writes, with the arguments and the InputErrors that it has.

    Args:
        parts: folder name -> tensors by name of which each of ``ranks`` holds a part; they are not
            gathered.
        ranks: those that write together; all of them call.
        copy: in memory of its own, so that training can go on before all is written.
    """
    target = Path(os.path.realpath(directory))
    check_target(target, foreign_entries)
    network = unwrapped(model)
    if not isinstance(network, nn.Module):
        raise InputError(f"cannot save a {type(network).__name__}: expected an nn.Module")
    state = _whole(plain_state(network), copy)
    description, expected = described(network, state)
    rates = ema.rates if ema is not None else []
    config = {
        "format": FORMAT,
        "model": description,
        "diffusion": None if diffusion is None else diffusion.to_config(),
        "step": step,
        "info": dict(info or {}),
        "ema": rates,
        "averages": None if ema is None else {"updates": ema.updates, "warmup": ema.warmup},
    }
    averages = {} if ema is None else whole_averages(network, ema, rates, copy=copy)
    check_saved(config, network, expected, averages)
    tensors = {MODEL_STEM: state, **{f"ema_{rate}": average for rate, average in averages.items()}}
    extras = {stem: _whole(group, copy) for stem, group in (extra_tensors or {}).items()}
    check_extra_names(extras, tensors, "extra_tensors")
    check_extra_names(extra_json or {}, {"config"}, "extra_json")
    texts = texts_of({"config": config, **(extra_json or {})})
    mine = {name: copied(group) if copy else group for name, group in (parts or {}).items()}
    return Prepared(target, {**tensors, **extras}, texts, mine, ranks)


def whole_averages(
    model: nn.Module, ema: EMA, names: Sequence[str], *, copy: bool = False
) -> dict[str, dict[str, Tensor]]:
    """Averages by their names, each with all that a state_dict of the network has; gathered where
    ranks hold parts of them, by all of them together."""
    network = unwrapped(model)
    # What is no parameter is not averaged: the running figures of a norm, masks, frequencies.
    buffers = {plain_name(name) for name, _ in network.named_buffers()}
    kept = {name: tensor for name, tensor in plain_state(network).items() if name in buffers}
    return {name: _whole({**kept, **ema.state_dict(name)}, copy) for name in names}


def _whole(tensors: Mapping[str, Tensor], copy: bool) -> dict[str, Tensor]:
    """The tensors, one after the other gathered where ranks hold parts of them."""
    return {name: whole(tensor, copy=copy) for name, tensor in tensors.items()}


def load(
    directory: str | os.PathLike[str],
    *,
    weights: str | float = "ema",
    device: str | torch.device = "cpu",
    model: Given = None,
) -> Checkpoint:
    """Read a checkpoint directory and build what it describes.

    Args:
        directory: what ``save`` wrote; a training run's, for its newest checkpoint; or that of a
            diffusers ``UNet2DModel`` or the pipeline around one (its ``unet/``), whose weights are
            ``"model"`` and whose process is the pipeline's scheduler's: its betas, prediction and
            variance. A directory of the network alone, such as the ``unet_ema/`` that a training
            script leaves beside ``unet/``, has no process.
        weights: ``"model"`` for the trained weights, a rate such as ``"0.9999"`` or a power
            function such as ``"power-0.05"`` for that average, ``"ema"`` for what suits best: the
            slowest average that has forgotten the untrained weights (less than 1 % of them left),
            the trained weights if there is none. ``Checkpoint.weights`` says which.
        device: where the network goes.
        model: the network that the weights are put into, in place, or a function without arguments
            that makes it. Needed where the checkpoint holds weights alone. Without it the class
            that the checkpoint names is imported, and called if it is an ``nn.Module``'s; give it
            for a checkpoint from somebody you do not trust.

    Raises:
        InputError: not a checkpoint, an unknown average, a damaged file, weights of another
            network, a network that cannot be made, a scheduler of another kind of process; the
            message names the file.
    """
    path = Path(os.path.abspath(directory))
    if not path.exists() and previous_directory(path).is_dir():
        # A save was killed between its two renames; the next one recovers.
        path = previous_directory(path)
    path = _checkpoint_in(path)
    diffusers_folder = unet_folder(path)
    if diffusers_folder is not None:
        if model is not None:
            raise InputError(f"{path} is a diffusers folder, which says what it holds: no model=")
        name, _ = _choose_weights(path, {}, [], weights)
        unet = load_unet(diffusers_folder).to(device)
        diffusion = load_process(path)
        config = {**nothing_saved(), "format": FORMAT, "model": unet.config}
        config["diffusion"] = None if diffusion is None else diffusion.to_config()
        return Checkpoint(unet, diffusion, None, {}, config, path, name)
    config = read_config(path)
    rates = build(path, "ema", lambda: [average_name(rate) for rate in config["ema"]])
    name, stem = _choose_weights(path, config, rates, weights)
    state = load_tensors(path, stem)

    network = made(path, config["model"], model)
    load_state(network, state, path / f"{stem}.safetensors")
    diffusion = None
    if config["diffusion"] is not None:
        diffusion = build(path, "diffusion", lambda: process_from_config(config["diffusion"]))
    return Checkpoint(
        model=network.to(device).eval(),
        diffusion=diffusion,
        step=config["step"],
        info=config["info"],
        config=config,
        path=path,
        weights=name,
        ema_rates=rates,
    )


def _checkpoint_in(path: Path) -> Path:
    """The newest checkpoint of a run's directory, or of the ``checkpoints`` in it; else ``path``.

    InputError for a run that has none yet, and for a file.
    """
    if path.is_file():
        remedy = f"fastdiff convert --model {path} makes one of a file of weights"
        if (path.parent / CONFIG_FILE).is_file():
            remedy = f"give the directory it lies in, {path.parent}"
        raise InputError(f"{path} is a file, not a checkpoint directory; {remedy}")
    if identify(path).kind in ("checkpoint", "diffusers"):
        return path
    run = path.parent if path.name == CHECKPOINTS else path
    found = list_checkpoints(run)
    if found:
        return found[-1]
    if identify(run).kind == "run":
        raise InputError(f"{run} is a training run that has saved no checkpoint yet")
    return path


def _choose_weights(
    path: Path, config: Mapping[str, Any], rates: list[str], weights: str | float
) -> tuple[str, str]:
    """(name of the weights, file stem)."""
    name = suited_weights(config, rates) if weights == "ema" else str(weights)
    if name == "model":
        return "model", "model"
    if name not in rates:
        with suppress(InputError):  # "0.90" and 0.9 mean "0.9"; other words are no averages
            name = average_name(weights)
    if name not in rates:
        there = ", ".join(["model", *rates])
        raise InputError(f"{path} has no weights {name!r}; there are {there}")
    return name, f"ema_{name}"

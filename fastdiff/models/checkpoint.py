"""Checkpoints: directories that describe themselves, written so that no crash spoils an older one.

- config.json: {"format", "model", "diffusion", "step", "info", "ema"}
- model.safetensors: the network's state_dict
- ema_<rate>.safetensors: one file per average
- whatever the caller adds
"""

import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastdiff.create import process_from_config
from fastdiff.errors import InputError
from fastdiff.models.ema import EMA, rate_name
from fastdiff.models.unet import UNet

FORMAT = 1
CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
# What config.json holds beside the format.
KINDS = {"model": dict, "diffusion": dict | None, "step": int | None, "info": dict, "ema": list}
_in_progress: set[Path] = set()  # temporary directories that threads of this process write


@dataclass
class Checkpoint:
    """What ``load`` found.

    Attributes:
        model: the network in eval mode, holding the weights asked for.
        diffusion: the process it was trained with, or None if none was saved.
        step: optimizer steps taken, or None.
        info: facts about the data: image_size, channels, num_classes, class_names, ...
        config: the whole of config.json.
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

    The files go to a hidden directory beside ``directory``, are flushed to the disk, and only then
    renamed into place; an older checkpoint of that name stays until the new one is complete. What a
    killed save left behind is removed by the next one.

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
    _check_target(target)
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

    texts = {stem: _to_json(f"{stem}.json", document) for stem, document in documents.items()}

    def write(folder: Path) -> None:
        for stem, group in tensors.items():
            _write_tensors(folder / f"{stem}.safetensors", group)
        for stem, text in texts.items():
            _write_json(folder / f"{stem}.json", text)

    target.parent.mkdir(parents=True, exist_ok=True)
    _replace_directory(target, write)
    return target


def load(
    directory: str | os.PathLike[str],
    *,
    weights: str | float = "ema",
    device: str | torch.device = "cpu",
) -> Checkpoint:
    """Read a checkpoint directory and build what it describes.

    Args:
        directory: what ``save`` wrote.
        weights: ``"model"`` for the trained weights, a rate such as ``"0.9999"`` for that average,
            ``"ema"`` for the average with the highest rate (the trained weights if there is none).
        device: where the network goes.

    Raises:
        InputError: not a checkpoint, an unknown average, a damaged file, or weights of another
            network; the message names the file.
    """
    path = Path(os.path.abspath(directory))
    if not path.exists() and _previous(path).is_dir():
        path = _previous(path)  # a save was killed between its two renames; the next one recovers
    config = _read_config(path)
    rates = _build(path, "ema", lambda: [rate_name(rate) for rate in config["ema"]])
    name, stem = _choose_weights(path, rates, weights)
    state = load_tensors(path, stem)

    model = _build(path, "model", lambda: UNet(**config["model"]))
    load_weights(model, state, path / f"{stem}.safetensors")
    diffusion = None
    if config["diffusion"] is not None:
        diffusion = _build(path, "diffusion", lambda: process_from_config(config["diffusion"]))
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


def load_tensors(directory: str | os.PathLike[str], stem: str) -> dict[str, Tensor]:
    """The tensors of ``<directory>/<stem>.safetensors``, on the CPU.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = Path(directory) / f"{stem}.safetensors"
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing from the checkpoint") from None
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({error})") from error


def load_json(directory: str | os.PathLike[str], stem: str) -> Any:
    """The value in ``<directory>/<stem>.json``.

    Raises:
        InputError: the file is missing or not JSON.
    """
    path = Path(directory) / f"{stem}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing from the checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error})") from error


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """``load_state_dict(strict=True)`` whose error is one line that names ``source``.

    Raises:
        InputError: names or shapes are not the model's.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    strangers = [name for name in state if name not in expected]
    if missing or strangers:
        details = [
            f"{len(names)} {what}, such as {names[0]}"
            for what, names in (("missing", missing), ("unexpected", strangers))
            if names
        ]
        raise InputError(
            f"{source} holds the weights of another network: {'; '.join(details)} "
            "(check the network's arguments)"
        )
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise InputError(
                f"{source} holds the weights of another network: {name} is "
                f"{tuple(state[name].shape)}, this network has {tuple(tensor.shape)}"
            )
    model.load_state_dict(state, strict=True)


# Reading


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
    config = {"model": None, "diffusion": None, "step": None, "info": {}, "ema": [], **config}
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


def _build(path: Path, part: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path / CONFIG_FILE}: its {part} cannot be built: {reason}") from error


# Writing


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"cannot save a checkpoint to {target}: it is a file, not a directory")
    # Saving replaces the whole directory, which must not cost anybody other files.
    names = {entry.name for entry in target.iterdir()}
    if names and not names >= {CONFIG_FILE, MODEL_FILE}:
        raise InputError(
            f"cannot save a checkpoint to {target}: it holds other files, such as {min(names)}; "
            "give a new or empty directory, or one that holds a checkpoint to replace"
        )


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Channels_last weights are written as their logical values; safetensors has no strides.
    flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.torch.save_file(flat, path)
        path.chmod(mode)  # the library's files are the owner's alone, whatever the umask says
    except safetensors.SafetensorError as error:
        # The library gives the system's error number as text only.
        number = re.search(r"os error (\d+)", str(error))
        code = int(number.group(1)) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _to_json(name: str, document: Any) -> str:
    try:
        return json.dumps(document, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot save {name}: {error}") from error


def _write_json(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _replace_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Make ``target`` what ``write`` writes, through a temporary directory beside it."""
    _recover(target)
    _remove_stale(target.parent)
    temporary = target.parent / f".{target.name}.saving-{socket.gethostname()}-{os.getpid()}"
    _in_progress.add(temporary)
    try:
        _write_directory(temporary, write)
        previous = _previous(target)
        if target.exists():
            # Between the two renames nothing has this name; ``_recover`` undoes the first.
            target.rename(previous)
        temporary.rename(target)
    finally:
        _in_progress.discard(temporary)
    _sync_directory(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _write_directory(path: Path, write: Callable[[Path], None]) -> None:
    path.mkdir()
    try:
        write(path)
        _sync_directory(path)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def _previous(target: Path) -> Path:
    return target.parent / f".{target.name}.previous"


def _recover(target: Path) -> None:
    """Undo or finish the renames of a save that was killed between them."""
    previous = _previous(target)
    if not previous.is_dir():
        return
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
    else:
        previous.rename(target)


def _remove_stale(parent: Path) -> None:
    """Remove temporary directories of processes of this machine that are gone."""
    pattern = re.compile(rf"\..+\.saving-{re.escape(socket.gethostname())}-(\d+)")
    for entry in parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and entry not in _in_progress and not _is_running(int(match.group(1))):
            shutil.rmtree(entry, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False  # a dead process had this number; ours are in _in_progress
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

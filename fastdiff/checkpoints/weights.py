"""Directories of .safetensors and .json files: read and written, with one-line errors."""

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastdiff.errors import InputError, first_line
from fastdiff.files import replacing_directory

CONFIG_FILE = "config.json"
# What building from a file's values may raise.
UNBUILDABLE = (TypeError, ValueError, KeyError, AttributeError, RuntimeError, OverflowError)


# Reading


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


def build(directory: Path, part: str, make: Callable[[], Any], *, file: str = CONFIG_FILE) -> Any:
    """What ``make`` builds from a part of one of the directory's JSON files.

    Raises:
        InputError: it cannot.
    """
    try:
        return make()
    except UNBUILDABLE as error:
        raise InputError(
            f"{directory / file}: its {part} cannot be built: {first_line(error)}"
        ) from error


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """``load_state_dict(strict=True)`` whose error is one line that names ``source``.

    Raises:
        InputError: names or shapes are not the model's.
    """
    convert = f"fastdiff convert --model {source} --strip {{prefix}} reads it"
    check_state(model.state_dict(), state, source, without_prefix=convert)
    model.load_state_dict(state, strict=True)


def check_state(
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    source: str | Path,
    *,
    without_prefix: str = "save the network inside",
    floats: bool = True,
) -> None:
    """That ``state`` has the names and shapes of ``expected``, and values.

    Args:
        without_prefix: what to do where a wrapper's {prefix} stands before the names.
        floats: whether floating-point numbers are expected of every tensor.

    Raises:
        InputError: it has not; one line that names ``source``.
    """
    difference = state_difference(expected, state)
    if difference is not None:
        prefix = common_prefix(expected, state)
        advice = "check the network's arguments"
        if prefix is not None:
            advice = f"its names begin with {prefix}, which a wrapper adds: "
            advice += without_prefix.format(prefix=prefix)
        raise InputError(f"{source} holds the weights of another network: {difference} ({advice})")
    for name, tensor in state.items():
        unfit = no_weight(tensor, floats=floats)
        if unfit is not None:
            raise InputError(f"{source} holds no weights of a network: its {name} {unfit}")


def state_difference(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """What names or shapes ``state`` has others than ``expected``; None if they are the same."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    if missing or unexpected:
        return "; ".join(
            f"{len(names)} {what}, such as {names[0]}"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        )
    for name, tensor in expected.items():
        if not is_lazy(state[name]) and state[name].shape != tensor.shape:
            came = tuple(state[name].shape)
            return f"{name} is {came}, this network has {tuple(tensor.shape)}"
    return None


def no_weight(tensor: Tensor, *, floats: bool = True) -> str | None:
    """Why a tensor cannot be a network's weight (a file's quantized one, for example), or None.

    Args:
        floats: whether it must hold floating-point numbers: networks of others have counters and
            masks among their weights.
    """
    if not isinstance(tensor, Tensor):
        return f"is a {type(tensor).__name__}, not a tensor"
    if is_lazy(tensor):
        return "has no shape yet; run the network once"
    if tensor.is_meta:
        return "has no values (it is on the meta device)"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"is a {type(tensor).__name__}, not a plain tensor"
    strided = tensor.layout == torch.strided
    if not strided or tensor.is_quantized or (floats and not tensor.is_floating_point()):
        layout = "" if strided else f" in layout {tensor.layout}"
        return f"is {tensor.dtype}{layout}; expected floating-point numbers"
    return None


def common_prefix(expected: Iterable[str], names: Iterable[str]) -> str | None:
    """What wrapper's prefix, such as "module.", stands before every one of the expected names."""
    names, first = set(names), next(iter(expected), "")
    for name in names:
        prefix = name.removesuffix(first)
        if prefix.endswith(".") and all(prefix + name in names for name in expected):
            return prefix
    return None


# Writing


def check_target(target: Path, foreign_entries: Callable[[Path], Iterable[str]]) -> None:
    """That nothing but an older save is lost when ``target`` is replaced.

    Args:
        foreign_entries: the entries of a directory that no such save wrote.

    Raises:
        InputError: ``target`` is a file or holds other things.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"cannot save a checkpoint to {target}: it is a file, not a directory")
    foreign = sorted(foreign_entries(target))
    if foreign:
        raise InputError(
            f"cannot save a checkpoint to {target}: it holds other files, such as {foreign[0]}; "
            "give a new or empty directory, or one that holds a checkpoint to replace"
        )


def write_directory(
    target: Path, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]
) -> None:
    """Make ``target`` a directory of these files, all of it or nothing.

    Args:
        target: its parent is made if missing; an older directory of that name is replaced.
        tensors: file name without ``.safetensors`` -> tensors by name.
        documents: file name without ``.json`` -> a JSON value.

    Raises:
        OSError: the disk is full or not writable; nothing has changed.
        InputError: a value has no JSON form; nothing has changed.
    """
    texts = texts_of(documents)
    with replacing_directory(target) as folder:
        write_files(folder, tensors, texts)


def write_files(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]
) -> None:
    """The files of :func:`write_directory`, into a folder that is there; ``texts``: of the JSON
    ones."""
    for stem, group in tensors.items():
        _write_tensors(folder / f"{stem}.safetensors", group)
    for stem, text in texts.items():
        (folder / f"{stem}.json").write_text(text, encoding="utf-8")


def texts_of(documents: Mapping[str, Any]) -> dict[str, str]:
    """Documents as the texts of their files. InputError: a value has no JSON form."""
    return {stem: to_json(f"{stem}.json", document) for stem, document in documents.items()}


def to_json(name: str, document: Any) -> str:
    """``document`` as the text of the file ``name``. InputError: a value has no JSON form."""
    try:
        return json.dumps(document, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot save {name}: {error}") from error


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Channels_last weights are written as their logical values; safetensors has no strides. Nor
    # has it tied weights: each name gets the values.
    flat: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        flat[name] = tensor.detach().cpu().contiguous()
        if flat[name].untyped_storage().data_ptr() in storages:
            flat[name] = flat[name].clone()
        storages.add(flat[name].untyped_storage().data_ptr())
    path.touch()
    mode = path.stat().st_mode
    try:
        # Some readers, Hugging Face's among them, ask the file which library's tensors it holds.
        safetensors.torch.save_file(flat, path, metadata={"format": "pt"})
        path.chmod(mode)  # the library's files are the owner's alone, whatever the umask says
    except safetensors.SafetensorError as error:
        # The library gives the system's error number as text only.
        number = re.search(r"os error (\d+)", str(error))
        code = int(number.group(1)) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error

"""Tensors of which each rank holds a part, in a folder into which each writes its own, by
torch.distributed.checkpoint: whoever reads them takes what it needs, whatever the ranks are then.

The files are safetensors, not DCP's own, whose ``.metadata`` is a pickle. DCP's joining of them
into whole ones takes floating-point numbers alone, so what users load is gathered instead.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints.weights import load_json, to_json
from fastdiff.errors import InputError, first_line
from fastdiff.ranks import Ranks

INDEX = "files"  # .json: the files' names, since one that is missing would go unnoticed

# name, shape, dtype -> what the tensor of that name is read into
Like = Callable[[str, torch.Size, torch.dtype], Tensor]


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same in the CPU's memory, in parts as before, which training no longer changes."""
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    staged: Any = BlockingAsyncStager().stage(dict(tensors))
    return staged


def write_parts(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Make ``folder``, on a disk that all ranks share: a call of all of them. What several have
    whole, one of them writes.

    OSError, the same on every rank, where one of them could not write.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    state = {name: tensor.contiguous() for name, tensor in tensors.items()}  # files have no strides
    try:
        with ranks.lost():
            dcp.save(state, storage_writer=writer, process_group=ranks.group)
    except CheckpointException as error:  # of which no message is one line
        rank, (reason, _) = min(error.failures.items())
        failure = OSError(f"rank {rank} could not write its part: {first_line(reason)}")
        failure.errno = getattr(reason, "errno", None)
        raise failure from error
    if ranks.rank == 0:
        names = sorted(path.name for path in folder.iterdir())
        (folder / f"{INDEX}.json").write_text(to_json(INDEX, names), encoding="utf-8")


def read_parts(folder: Path, like: Like) -> dict[str, Tensor]:
    """What ``write_parts`` wrote, each tensor read into its ``like``, which may hold a part of it;
    says nothing to other ranks.

    InputError where a file is missing or damaged.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    for name in load_json(folder, INDEX):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing from the checkpoint")
    try:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        found: Any = reader.read_metadata().state_dict_metadata  # of tensors alone
        tensors = {name: like(name, of.size, of.properties.dtype) for name, of in found.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each reads alone
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except InputError:
        raise
    except (CheckpointException, Exception) as error:
        reasons = [reason for reason, _ in getattr(error, "failures", {}).values()]
        raise InputError(f"{folder} is damaged: {first_line((reasons or [error])[0])}") from error
    return tensors

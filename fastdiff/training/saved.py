"""A checkpoint as a trainer writes it and reads it back: all of it, or an error that names the
damaged file."""

import io
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import whole_averages
from fastdiff.checkpoints.network import Given, described
from fastdiff.checkpoints.parts import read_parts
from fastdiff.checkpoints.run_directory import held_for_all
from fastdiff.checkpoints.snapshots import write_snapshot
from fastdiff.checkpoints.weights import load_json, load_tensors
from fastdiff.data.loaders import LoaderStream
from fastdiff.errors import InputError
from fastdiff.models.ema import sigma_rel_of
from fastdiff.models.wrappers import plain_name, plain_state, unwrapped
from fastdiff.ranks import ALONE, Ranks
from fastdiff.training.batches import size_of
from fastdiff.training.config import TrainConfig
from fastdiff.training.run import Run
from fastdiff.training.state import prefixed, prune_checkpoints, with_prefix
from fastdiff.training.update_state import moments_like

STATE = "trainer"  # file stem of the trainer's own part of a checkpoint
OPTIMIZER = "optimizer"  # the prefix of its tensors there; or, in parts, the name of their folder


@dataclass(frozen=True)
class SavedRun:
    """Everything in one checkpoint directory of a training run."""

    path: Path
    model: Any
    diffusion: Any
    config: TrainConfig
    info: Mapping[str, Any]
    step: int
    reported: int
    batches_drawn: int
    images: int | None
    update: Mapping[str, Any] | None
    averages: Mapping[str, Mapping[str, Tensor]]
    tensors: Mapping[str, Tensor]
    in_parts: bool  # whether the optimizer's are not among them, but in a folder

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The trainer's tensors of one origin: optimizer, timesteps, meter or reader."""
        return with_prefix(prefix, self.tensors)


def read_checkpoint(path: Path, model: Given = None) -> SavedRun:
    """Read every file of ``path``, the network into ``model`` where that is given.

    Raises InputError naming the file that is missing or damaged.
    """
    try:
        loaded = checkpoint.load(path, weights="model", model=model)
        record = load_json(path, STATE)
        _freeze(loaded.model, record.get("frozen", []))
        return SavedRun(
            path=path,
            model=loaded.model,
            diffusion=loaded.diffusion,
            # Before there was a choice, the averages' rates were constant.
            config=TrainConfig.from_dict({"ema_warmup": False, **record["config"]}),
            info=loaded.info,
            step=record["step"],
            reported=record.get("reported", record["step"]),
            batches_drawn=record["batches_drawn"],
            images=record["images"],
            update=record.get("update"),
            averages={r: load_tensors(path, f"ema_{r}") for r in loaded.ema_rates},
            tensors=load_tensors(path, STATE),
            in_parts=(path / OPTIMIZER).is_dir(),
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{path / STATE}.json lacks {error}; {_advice(path)}") from error
    except InputError as error:
        raise InputError(f"{error}; {_advice(path)}") from error


def _advice(path: Path) -> str:
    return f"delete {path} to resume from the checkpoint before it"


def _freeze(model: nn.Module, names: Sequence[str]) -> None:
    """What was not trained is not trained on."""
    for name, parameter in model.named_parameters():
        if plain_name(name) in names:
            parameter.requires_grad_(False)


def model_config(model: nn.Module) -> Any:
    """What a run's config.json says of the network. InputError for one that cannot be saved."""
    network = unwrapped(model)
    return described(network, plain_state(network))[0]


def _reader_of(trainer: Run) -> Tensor | None:
    """Where this rank's loader is in its data, as it says itself: bytes of ``torch.save``."""
    stream = trainer.stream
    found = stream.state_dict() if isinstance(stream, LoaderStream) else None
    if found is None:
        return None
    buffer = io.BytesIO()
    torch.save(found, buffer)
    packed = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    try:
        _unpacked(packed)
    except pickle.UnpicklingError:
        warnings.warn(
            "the DataLoader's state_dict holds more than numbers, text and tensors, and is not "
            "saved: a resumed run will read the data from the start up to its step",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return packed


def _unpacked(packed: Tensor) -> Any:
    return torch.load(io.BytesIO(packed.numpy().tobytes()), weights_only=True)


def shares_of(trainer: Run, ranks: Ranks) -> dict[str, Tensor]:
    """What each of ``ranks`` adds to the trainer's tensors: what it has measured since the last log
    line, where it is in the data."""
    readers = ranks.gather(_reader_of(trainer))
    known = {str(rank): reader for rank, reader in enumerate(readers) if reader is not None}
    return {**prefixed("meter", trainer.meter.merged(ranks)), **prefixed("reader", known)}


def tensors_of(trainer: Run, shares: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The trainer's own tensors that are whole; ``shares`` of all ranks, None: of this one
    alone."""
    optimizer = {} if trainer.is_spread else trainer.update.tensors()
    return {
        **prefixed(OPTIMIZER, optimizer),
        **prefixed("timesteps", trainer.timesteps.state_dict()),
        **(shares_of(trainer, ALONE) if shares is None else shares),
    }


def record_of(trainer: Run) -> dict[str, Any]:
    """The trainer's own numbers, for JSON."""
    return {
        "step": trainer.step,
        "reported": trainer.reports.done,
        "batches_drawn": trainer.stream.position,
        "images": size_of(trainer.data),
        "config": trainer.config.to_dict(),
        "update": trainer.update.record(),
        "frozen": [
            plain_name(name)
            for name, parameter in trainer.model.named_parameters()
            if not parameter.requires_grad
        ],
    }


def take_snapshot(trainer: Run) -> None:
    """Store the power-function averages of this step: a call of all ranks. Rank 0 writes."""
    names = [name for name in trainer.ema.rates if sigma_rel_of(name) is not None]

    def work() -> None:
        averages = whole_averages(trainer.model, trainer.ema, names)
        if trainer.ranks.rank == 0:
            write_snapshot(trainer.run_dir, trainer.step, averages)

    trainer.with_weights(work)


def prepared(
    trainer: Run,
    path: Path,
    shares: Mapping[str, Tensor] | None,
    ranks: Ranks = ALONE,
    *,
    copy: bool = False,
) -> Callable[[], None]:
    """What writes the checkpoint ``path`` of the trainer as it is now, and then deletes older ones
    than are kept.

    Args:
        shares: as :func:`tensors_of`'s.
        ranks: those that write it together, of a network that is spread over them.
        copy: the trainer may go on before that is done.
    """
    ready = checkpoint.prepare(
        path,
        trainer.model,
        diffusion=trainer.diffusion,
        ema=trainer.ema,
        step=trainer.step,
        info=trainer.info,
        extra_tensors={STATE: tensors_of(trainer, shares)},
        extra_json={STATE: record_of(trainer)},
        parts={OPTIMIZER: trainer.update.tensors()} if trainer.is_spread else {},
        ranks=ranks,
        copy=copy,
    )
    run_dir, keep = trainer.run_dir, trainer.config.keep

    def write() -> None:
        ready.write()
        if ranks.rank == 0:
            prune_checkpoints(run_dir, keep)

    return write


def settings_of(trainer: Run) -> dict[str, Any]:
    """What a run's config.json says."""
    return {
        "train": trainer.config.to_dict(),
        "model": trainer.description,
        "diffusion": trainer.diffusion.to_config(),
        "info": trainer.info,
    }


def restore(trainer: Run, read: SavedRun, data_changed: bool) -> None:
    """Give ``trainer`` everything but the weights, which its model came with."""
    images = size_of(trainer.data)
    if data_changed:
        change = {"step": read.step, "images": images, "before": read.images}
        trainer.info["data_changes"] = [*trainer.info.get("data_changes", []), change]
    elif images != read.images:
        raise InputError(
            f"the data set has {images} images, but '{trainer.run_dir}' was trained on "
            f"{read.images}: put back what is missing (a broken picture that is passed over "
            "counts as missing), or go on with what is there, in a new order: --data-changed "
            "(in Python data_changed=True)"
        )
    else:
        _restore_reader(trainer, read)
    trainer.step = trainer.ema.updates = read.step
    trainer.reports.done = read.reported
    for rate in trainer.ema.rates:
        average = read.averages[rate]  # in whose file is what is not averaged, too
        names = average.keys() & set(trainer.ema.names)
        trainer.ema.load_state_dict(rate, {name: average[name] for name in names})
    trainer.update.check_changes(read.config)
    trainer.update.load(_optimizer_of(read, trainer), read.update)
    trainer.timesteps.load_state_dict(read.part("timesteps"))
    trainer.meter.load_state_dict(read.part("meter"), trainer.ranks.rank)
    trainer.saving.stands(read.path, (read.step, read.reported))


def _optimizer_of(read: SavedRun, trainer: Run) -> dict[str, Tensor]:
    """The optimizer's tensors, in parts as the trainer's are where they were saved so: a call of
    all ranks, and the one part of a checkpoint that was not read with the others."""
    if not read.in_parts:
        return read.part(OPTIMIZER)

    def work() -> dict[str, Tensor]:
        if not read.path.is_dir():
            raise InputError(
                f"{read.path} is no longer there: its run was trained on meanwhile, resume again"
            )
        try:
            return read_parts(read.path / OPTIMIZER, moments_like(trainer.model))
        except InputError as error:
            raise InputError(f"{error}; {_advice(read.path)}") from error

    with held_for_all(read.path.parents[1], trainer.ranks):
        return trainer.ranks.together(work)


def _restore_reader(trainer: Run, read: SavedRun) -> None:
    """Go on in the data as the loaders of as many ranks said, else by reading up to there."""
    readers, stream = read.part("reader"), trainer.stream
    if len(readers) == trainer.ranks.count and isinstance(stream, LoaderStream) and stream.stateful:
        mine = _unpacked(readers[str(trainer.ranks.rank)])
        stream.load_state_dict(mine, read.batches_drawn)
    else:
        stream.position = read.batches_drawn

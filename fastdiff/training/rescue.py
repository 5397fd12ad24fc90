"""What an error in mid-run costs: nothing, where weights and optimizer are good."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from fastdiff.errors import InputError, TrainingError, first_line
from fastdiff.training import state
from fastdiff.training.stop import StopRequest


class Rescued(Protocol):
    """What of a trainer a rescue needs."""

    step: int
    stream: Any
    device: torch.device
    metrics: Any
    half_done: bool

    def advice(self) -> str: ...
    def write_checkpoint(self) -> Path: ...


@contextmanager
def rescued(trainer: Rescued, stop: StopRequest) -> Iterator[None]:
    """Save when the block, a step and its report, fails but leaves the weights good; and say so.

    The checkpoint is of the last finished step, as if the failed one had not been begun. A run
    that has diverged, one whose update was cut in the middle and one whose user will not wait are
    not saved.
    """
    step, position = trainer.step, trainer.stream.position
    rng = state.rng_tensors(trainer.device)
    try:
        yield
    except TrainingError:
        raise
    except BaseException as error:
        if stop.impatient:
            raise
        if trainer.half_done:
            note = f"step {step + 1} was half done; {trainer.advice()}"
        else:
            if trainer.step == step:
                trainer.stream.position = position
                state.load_rng_tensors(rng, trainer.device)
            note = _save(trainer)
        noted = _with_note(error, note)
        if noted is error:
            raise
        raise noted from error


def _save(trainer: Rescued) -> str:
    """Save after an error; what to say of it, which must not hide that error."""
    if trainer.step == 0:
        return "no step had been finished"
    try:
        # The lines before this step are written. If they cannot be synced, the rest may still fit.
        with suppress(OSError, ValueError):
            trainer.metrics.sync()
        path = trainer.write_checkpoint()
    except Exception as failure:
        reason = first_line(failure)
        return f"step {trainer.step} could not be saved ({reason}); {trainer.advice()}"
    return f"step {trainer.step} is saved in {path}: resume the run once that is mended"


def _with_note(error: BaseException, note: str) -> BaseException:
    """The error with ``note`` at the end of its message: another one of its kind, where it is one
    the command line prints, else the same with a note (PEP 678)."""
    if isinstance(error, InputError):
        return InputError(f"{error}; {note}")
    if isinstance(error, OSError):
        longer = OSError(f"{error}; {note}")
        longer.errno = error.errno
        return longer
    error.add_note(note)
    return error

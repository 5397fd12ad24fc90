"""What an error in mid-run costs: nothing, where weights and optimizer are good."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fastdiff.data.processes import is_gone, unreadable
from fastdiff.errors import InputError, LostRank, TrainingError, first_line
from fastdiff.training.run import Run
from fastdiff.training.stop import StopRequest


@contextmanager
def rescued(trainer: Run, stop: StopRequest) -> Iterator[None]:
    """Save when the block, a step and its report, fails but leaves the weights good; and say so.

    The checkpoint is of the last finished step, as if the failed one had not been begun. A run
    that has diverged, one whose update was cut in the middle and one whose user will not wait are
    not saved. Of several ranks, whose weights are the same, rank 0 saves.
    """
    step, position = trainer.step, trainer.stream.position
    try:
        yield
    except TrainingError as error:
        if not isinstance(error, LostRank):
            raise
        raise LostRank(f"{error}; {_saved(trainer, step, position)}") from error
    except BaseException as error:
        if stop.impatient:
            raise
        noted = _with_note(error, _saved(trainer, step, position))
        if noted is error:
            raise
        raise noted from error


def _saved(trainer: Run, step: int, position: int) -> str:
    """Save after an error in the step after ``step``; what to say of it, which must not hide that
    error."""
    if trainer.half_done:
        return f"step {step + 1} was half done; {trainer.saving.advice()}"
    if trainer.step == step:
        trainer.stream.position = position
    if trainer.step == 0:
        return "no step had been finished"
    if trainer.is_spread:  # the other ranks would have to give their parts
        return trainer.saving.advice()
    if trainer.ranks.rank:
        return f"this was rank {trainer.ranks.rank}; rank 0 saves step {trainer.step} if it can"
    try:
        # The lines before this step are written. If they cannot be synced, the rest may still fit.
        with suppress(OSError, ValueError):
            trainer.reports.sync()
        path = trainer.saving.save_alone(trainer)
    except Exception as failure:
        reason = first_line(failure)
        return f"step {trainer.step} could not be saved ({reason}); {trainer.saving.advice()}"
    return f"step {trainer.step} is saved in {path}: resume the run once that is mended"


def _with_note(error: BaseException, note: str) -> BaseException:
    """The error with ``note`` at the end of its message: another one of its kind, where it is one
    the command line prints, else the same with a note (PEP 678)."""
    if isinstance(error, Exception) and is_gone(error):
        error = unreadable("a batch", error)
    if isinstance(error, InputError):
        return InputError(f"{error}; {note}")
    if isinstance(error, OSError):
        longer = OSError(f"{error}; {note}")
        longer.errno = error.errno
        return longer
    error.add_note(note)
    return error

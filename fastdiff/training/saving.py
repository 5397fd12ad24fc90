"""When the checkpoints of a run are written: at once, or one at a time beside its steps."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from fastdiff.checkpoints.run_directory import checkpoint_path
from fastdiff.ranks import ALONE, Ranks
from fastdiff.training.guard import check_weights
from fastdiff.training.run import Run
from fastdiff.training.saved import prepared


class Saving:
    """The checkpoints that a run writes.

    Attributes:
        last: the newest one that is on the disk.
        of: the step of the newest one, and the step reported then, though it may be on its way.
    """

    def __init__(self) -> None:
        self.last: Path | None = None
        self.of: tuple[int, int] | None = None
        self._coming: Path | None = None
        self._written: Future[None] | None = None  # on the ranks that write
        self._thread: ThreadPoolExecutor | None = None
        self._apart: Ranks | None = None  # to speak from that thread

    def stands(self, path: Path, of: tuple[int, int]) -> None:
        """``path`` is on the disk."""
        self.last, self.of, self._coming = path, of, None

    def save(self, run: Run, shares: dict[str, Tensor]) -> Path:
        """Write the checkpoint of this step, unless it stands already: a call of all ranks, each
        with the shares of all (``saved.shares_of``). With ``async_save`` it is on the disk once
        :meth:`finish` has come back.

        TrainingError where the weights are not finite, OSError when the disk is full.
        """
        self.finish(run)
        path, of = _place(run)
        if self.of == of:
            return path
        ranks = self._writers(run)
        # Before the ranks of a network that is spread over them gather it together.
        run.with_weights(lambda: self._check(run))
        run.ranks.on_first(self._told()(run.reports.sync))
        run.with_weights(lambda: self._begin(run, path, shares, ranks))
        self._coming, self.of = path, of
        if not run.config.async_save:
            self.stands(path, of)
        return path

    def save_alone(self, run: Run) -> Path:
        """:meth:`save` at once, by this rank with what it has alone."""
        with suppress(OSError):
            self._wait()
            self._arrived()
        path, of = _place(run)
        if self.of != of:
            self._check(run)
            prepared(run, path, None, ALONE)()
        self.stands(path, of)
        return path

    def finish(self, run: Run) -> None:
        """Wait for the checkpoint that is being written: a call of all ranks. OSError where it
        could not be."""
        run.ranks.together(self._wait)
        self._arrived()

    def _arrived(self) -> None:
        if self._coming is not None and self.of is not None:
            self.stands(self._coming, self.of)

    @property
    def failed(self) -> bool:
        """Whether :meth:`finish` will raise, as far as this rank knows."""
        written = self._written
        return written is not None and written.done() and written.exception() is not None

    def close(self) -> None:
        """Wait for the checkpoint that is being written, whatever comes of it."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        if self._written is not None and self._written.exception() is None:
            self._written = None
            self._arrived()

    def advice(self) -> str:
        """The end of an error message: where to go on from."""
        if self._written is not None and self._written.done() and not self.failed:
            return f"the last good checkpoint is {self._coming}"
        if self.last is None:
            return "no checkpoint had been saved yet"
        return f"the last good checkpoint is {self.last}"

    def _writers(self, run: Run) -> Ranks:
        """Those that write a checkpoint together: a call of all ranks."""
        if not run.is_spread:
            return ALONE
        if not run.config.async_save:
            return run.ranks
        self._apart = self._apart or run.ranks.apart()
        return self._apart

    def _begin(self, run: Run, path: Path, shares: dict[str, Tensor], ranks: Ranks) -> None:
        background = run.config.async_save
        with self._told():
            write = prepared(run, path, shares, ranks, copy=background)
            if not background:
                write()
                return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "fastdiff-checkpoint")
        self._written = self._thread.submit(self._told()(write))

    def _check(self, run: Run) -> None:
        run.guard.check(self.advice())
        check_weights(run.update.parameters, run.step, self.advice())

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"checkpoint not saved: {error}; {self.advice()}") from error

    def _wait(self) -> None:
        written = self._written
        if written is None:
            return
        error = written.exception()  # which a Ctrl-C may interrupt: it is still being written then
        self._written = None
        if error is not None:
            self.of = self._coming = None
            raise error


def _place(run: Run) -> tuple[Path, tuple[int, int]]:
    return checkpoint_path(run.run_dir, run.step), (run.step, run.reports.done)

"""What a run tells of itself as it is trained: lines of figures, bits/dim, grids of samples, a bar.

All ranks measure, rank 0 writes.
"""

import contextlib
import time
from collections.abc import Iterator

from fastdiff.images import save_grid
from fastdiff.training import preview
from fastdiff.training.boards import open_boards
from fastdiff.training.metrics import MetricsWriter
from fastdiff.training.progress import progress_bar
from fastdiff.training.run import Run


class Reports:
    """The reports of a run's steps.

    Attributes:
        done: the step that was reported last, or had nothing to report.
    """

    def __init__(self) -> None:
        self.done = 0
        self.metrics: MetricsWriter | None = None  # of rank 0

    @contextlib.contextmanager
    def opened(self, trainer: Run) -> Iterator[None]:
        """The files and the bar, for the length of a run."""
        config, first = trainer.config, trainer.ranks.rank == 0
        self._clock = trainer.step, time.monotonic()
        with contextlib.ExitStack() as stack:
            if first:
                boards = open_boards(trainer.run_dir, self.done, config, trainer.info)
                writer = MetricsWriter(trainer.run_dir, self.done, boards)
                self.metrics = stack.enter_context(writer)
            bar = progress_bar(config.steps, trainer.step, trainer.show_progress and first)
            self.bar = stack.enter_context(bar)
            yield

    def sync(self) -> None:
        """Put what was written on the disk."""
        if self.metrics is not None:
            self.metrics.sync()

    def make(self, trainer: Run) -> dict[str, float]:
        """Report what is due after the trainer's step; after an error it is still to do. Its log
        line, {} where it has none."""
        meter = trainer.meter.state_dict()
        try:
            values = self._make(trainer)
        except BaseException:
            trainer.meter.load_state_dict(meter)
            raise
        self.done = trainer.step
        self.bar.update()
        return values

    def _make(self, trainer: Run) -> dict[str, float]:
        config = trainer.config
        values: dict[str, float] = {}
        if trainer.due(config.log_every) or trainer.step == config.steps:
            trainer.check_finite()
            values |= trainer.meter.summary(trainer.ranks)
            values["lr"] = float(trainer.update.lr)
            if trainer.update.scaler.is_enabled():
                values["loss_scale"] = trainer.update.scaler.get_scale()
            values["samples"] = trainer.step * config.batch_size
            values["steps_per_second"] = self._steps_per_second(trainer.step)
            steps_left = config.steps - trainer.step
            values["seconds_left"] = steps_left / values["steps_per_second"]
            self.bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        if trainer.due(config.nll_every):
            with trainer.averaged():
                values |= preview.measure_nll(trainer)
        if trainer.due(config.fid_every):
            with trainer.averaged():
                values |= trainer.scores.measure(trainer)
        if values and self.metrics is not None:
            self.metrics.write(trainer.step, values)
        if trainer.due(config.sample_every):
            with trainer.averaged():
                images = preview.draw_samples(trainer, config.sample_count)
            if self.metrics is not None:
                save_grid(images, trainer.run_dir / "samples" / f"step_{trainer.step:08d}.png")
                self.metrics.write_images(trainer.step, "samples", images)
        return values

    def _steps_per_second(self, step: int) -> float:
        """Since the last call, whatever happened in between; of all ranks, which go in step."""
        now = time.monotonic()
        # A line that an error had kept back is of steps before this clock: one step stands for it.
        rate = max(step - self._clock[0], 1) / max(now - self._clock[1], 1e-9)
        self._clock = step, now
        return rate

"""The processes torchrun started, or the one there is without it: who does what, how all end.

What they tell each other is little: whether all go on, and what the first of them found.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from fastdiff.errors import InputError, TrainingError, first_line
from fastdiff.training.checks import choose_device

T = TypeVar("T")

# Set by torchrun, or by whoever starts the processes in its place.
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
PLACE = ("MASTER_ADDR", "MASTER_PORT")

ARRIVAL = timedelta(minutes=10)  # for all processes to find each other
# A process with nothing left to do waits while another draws, which no one can foresee. When a
# process dies, torchrun ends the others; the limit is for those that hang.
DRAWING = timedelta(days=1)
FAREWELL = 5  # seconds torchrun is given to end this process after another has failed

EXPECTED = (InputError, TrainingError, OSError)  # what the command line prints as one line


@dataclass(frozen=True)
class Processes:
    """One of ``count`` processes, on ``device`` (as --device names it; None leaves it open)."""

    rank: int = 0
    count: int = 1
    device: str | None = None
    group: Any = None

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's share of what all have: every ``count``-th item."""
        return list(items[self.rank :: self.count])

    def together(self, work: Callable[[], T]) -> T:
        """``work()``, while every other process does the same.

        When it fails anywhere all end here: the first process that failed raises its error, the
        others leave without a word, with its exit code.
        """
        if self.group is None:
            return work()
        error = None
        try:
            result = work()
        except EXPECTED as caught:
            error = caught
        failed = self._gather(error is not None)
        if not any(failed):
            return result
        if error is not None and failed.index(True) == self.rank:
            raise error
        raise SystemExit(2)

    def on_first(self, work: Callable[[], T]) -> T:
        """``work()`` on process 0 alone; every process gets its answer, or ends with it."""
        answer: Any = self.together(lambda: work() if self.rank == 0 else None)
        return answer if self.group is None else self._gather(answer)[0]

    def leave(self) -> None:
        """Wait until all have come here, and part: each goes on alone."""
        if self.group is not None:
            self._gather(None)
            torch.distributed.destroy_process_group()

    def _gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank. TrainingError when one of them is gone."""
        values = [None] * self.count
        try:
            torch.distributed.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            # The failed process has said why, and torchrun is about to end this one too.
            time.sleep(FAREWELL)
            raise TrainingError(
                f"process {self.rank} of {self.count} lost the others ({first_line(error)}); "
                "the same command goes on from the finished batches"
            ) from error
        return values


def refuse_several() -> None:
    """End where this is one of several processes that would all do the same work.

    InputError in the first of them; the others leave without a word, with its exit code.
    """
    count = _number("WORLD_SIZE", 1)
    if count <= 1:
        return
    if _number("RANK", _number("SLURM_PROCID", 0)) != 0:
        raise SystemExit(2)
    raise InputError(
        f"started as {count} processes (WORLD_SIZE), which would each do all of the work and "
        "overwrite each other's: start one process (unset WORLD_SIZE if it is one); "
        "fastdiff sample shares its work"
    )


def _number(name: str, default: int) -> int:
    """An integer of the environment. InputError when it is none."""
    text = os.environ.get(name, "").strip()
    try:
        return int(text) if text else default
    except ValueError:
        raise InputError(f"the environment's {name} is {text!r}, expected a number") from None


def join(device: str | None) -> Processes:
    """Meet the other processes; without torchrun's environment there are none.

    Args:
        device: as --device names it. Each of several processes takes the GPU of its LOCAL_RANK.

    Raises:
        InputError: no such device, fewer GPUs than processes, or no number where one belongs.
    """
    if not all(name in os.environ for name in NUMBERS + PLACE):
        return Processes(device=device)
    rank, count, local_rank, local_count = (_number(name, 0) for name in NUMBERS)
    if count == 1:
        return Processes(device=device)
    try:
        on_gpus = _on_gpus(device, local_count)
    except InputError:
        if local_rank != 0:  # one line is enough of what every process finds
            raise SystemExit(2) from None
        raise
    if on_gpus:
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(choose_device(device))
    torch.distributed.init_process_group("nccl" if on_gpus else "gloo", timeout=ARRIVAL)
    return Processes(rank, count, device, torch.distributed.new_group(timeout=DRAWING))


def _on_gpus(device: str | None, local_count: int) -> bool:
    """Whether the processes of this machine, ``local_count`` of them, take a GPU each."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not device.startswith("cuda"):
        choose_device(device)
        return False
    if device != "cuda":
        raise InputError(
            f"--device {device} is one GPU for {local_count} processes; with --device cuda each "
            "takes its own"
        )
    if local_count > torch.cuda.device_count():
        raise InputError(
            f"{local_count} processes on this machine and {torch.cuda.device_count()} GPUs; "
            "start as many processes as there are GPUs, or give --device cpu"
        )
    return True

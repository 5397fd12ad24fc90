"""What may go wrong on one rank of a training run, at its fifth step."""

import errno
import math
import os
import time

import torch

from fastdiff.errors import InputError
from fastdiff.training.feed import Feed
from fastdiff.training.trainer import Trainer

STEP = 4  # steps that are finished before


def spoil(fault: str) -> None:
    """Make this process's trainer fail so: "nan", "read", "step", "shape", "hang", "overflow",
    a gradient that no float16 holds, or "disk", which is full when step 6 is saved."""
    if fault == "disk":
        _fill_disk()
        return
    read, take = Feed._read, Trainer._train_step

    def failing_step(self: Trainer) -> None:
        if self.step == STEP and fault == "hang":
            time.sleep(3600)
        if self.step == STEP and fault in ("nan", "step", "overflow"):
            compute = self.diffusion.training_losses

            def spoiled(*args, **kwargs):
                if fault == "step":
                    raise torch.OutOfMemoryError("no memory for the activations")
                losses = compute(*args, **kwargs)
                losses["loss"] = losses["loss"] * (1e30 if fault == "overflow" else math.nan)
                return losses

            self.diffusion.training_losses = spoiled
        take(self)

    def failing_read(self: Feed, step: int):
        if step == STEP and fault in ("read", "shape"):
            draw = type(self.stream).__next__

            def next_batch(stream):
                if fault == "read":
                    raise InputError("'a.png' cannot be decoded")
                images, labels = draw(stream)
                return images[1:], labels[1:]

            type(self.stream).__next__ = next_batch
        return read(self, step)

    Feed._read, Trainer._train_step = failing_read, failing_step


def _fill_disk() -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    from fastdiff.checkpoints import checkpoint

    write, write_part = checkpoint.write_files, HuggingFaceStorageWriter.write_data

    def check(folder) -> None:
        if "step_00000006" in str(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(folder, *args):
        check(folder)
        write(folder, *args)

    def full_of_parts(self, *args):
        check(self.path)
        return write_part(self, *args)

    checkpoint.write_files, HuggingFaceStorageWriter.write_data = full, full_of_parts

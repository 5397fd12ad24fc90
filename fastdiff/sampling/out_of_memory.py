"""What to say when a batch does not fit into memory."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from fastdiff.errors import InputError, first_line
from fastdiff.sampling.kwargs import narrowed
from fastdiff.sampling.stats import Stats
from fastdiff.sampling.step import Run, State


@contextmanager
def explains_out_of_memory(run: Run, x: Tensor, i: int) -> Iterator[None]:
    """Around row i: running out of memory becomes an InputError that names a batch that fits."""
    try:
        yield
    except RuntimeError as error:
        if not too_large(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what the step had allocated
        raise largest_batch(run, x, i, first_line(error)) from None


def too_large(error: RuntimeError) -> bool:
    """Whether memory ran out; on the CPU PyTorch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def largest_batch(run: Run, x: Tensor, i: int, message: str) -> InputError:
    """The error for a batch that row i had no memory for: it names a size that has."""
    if x.device.type == "cuda":
        torch.cuda.empty_cache()
    count = len(x)
    size = count // 2
    while size and not _fits(run, x[:size], i):
        size //= 2
    what = f"no memory on {x.device} for a batch of {count}"
    if size:
        what += f"; one of {size} fits: sample in batches of that size"
    else:
        what += ", nor for a single sample: use a smaller dtype, or free memory"
    return InputError(f"{what} ({message})")


def _fits(run: Run, x: Tensor, i: int) -> bool:
    images, count = run.stats.images, len(x)
    fewer = replace(
        run,
        kwargs=narrowed(run.kwargs, images, count),
        doubled=narrowed(run.doubled, 2 * images, 2 * count),
        guide_kwargs=narrowed(run.guide_kwargs, images, count),
        stats=Stats(),
    )
    try:
        fewer.run_networks(State(x, None, ()), fewer.table.at("timesteps", i), i)
    except RuntimeError as error:
        if not too_large(error):
            raise
        return False
    return True

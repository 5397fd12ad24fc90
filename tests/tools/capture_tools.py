"""Samplers whose graphs are captured on the CPU, on the stand-in of graph_tape.py."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from fastdiff.sampling import capture
from fastdiff.sampling.network import execution, packing
from fastdiff.sampling.sampler import Sampler
from graph_tape import Tape
from sampler_tools import SHAPE, Tiny, diffusion

PROCESS = diffusion(40)


@contextmanager
def taped() -> Iterator[Callable[[], int]]:
    """Inside, samplers capture on the CPU; how many graphs were captured so far."""
    before = Tape.made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "GRAPH", Tape)
        patch.setattr(packing, "serves", lambda dtype: False)  # a GPU has nothing packed
        patch.setattr(execution, "slower", lambda dtype: "a GPU")  # nor programs
        yield lambda: Tape.made - before


def pair(model=None, process=PROCESS, **options):
    """A captured and an eager sampler."""
    model = Tiny().eval() if model is None else model
    return (
        Sampler(model, process, capture=True, **options),
        Sampler(model, process, capture=False, **options),
    )


def assert_equal(captured, eager, *shape, **arguments):
    shape = shape or SHAPE
    actual, expected = captured.sample(shape, **arguments), eager.sample(shape, **arguments)
    assert torch.equal(actual, expected)
    assert captured.explain().startswith("a captured CUDA graph")
    assert eager.explain().startswith("eager: capture=False")
    return actual

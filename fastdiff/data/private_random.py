"""The random numbers that a data set of the user's draws, to augment or to shuffle: its own.

torch's, numpy's and Python's global generators give them. Nobody else's are touched, and what a set
draws follows from a seed, so that a resumed run repeats it.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class PrivateRandom:
    """The global generators as a reader sees them: inside ``with``, they go on from where the last
    block left them; outside, they are everybody's."""

    def __init__(self) -> None:
        self._mine: dict[str, Any] | None = None  # None: begins with everybody's

    def __enter__(self) -> None:
        self._others = get_state()
        if self._mine is not None:
            set_state(self._mine)

    def __exit__(self, *error: object) -> None:
        self._mine = get_state()
        set_state(self._others)

    def state_dict(self) -> dict[str, Any] | None:
        """For ``set_state``: of lists, numbers and tensors."""
        return self._mine


@contextmanager
def left_alone() -> Iterator[None]:
    """Whatever the block does with the global generators, they are as before when it ends."""
    state = get_state()
    try:
        yield
    finally:
        set_state(state)


def get_state() -> dict[str, Any]:
    """Of the global generators."""
    numpy: Any = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    return {
        "torch": torch.default_generator.get_state(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": key}},
        "python": random.getstate(),
    }


def set_state(state: dict[str, Any]) -> None:
    """Of the global generators, as ``get_state`` gave it."""
    numpy = state["numpy"]
    key = numpy["state"]["key"].numpy().astype(np.uint32)
    torch.default_generator.set_state(state["torch"])
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    random.setstate(state["python"])


def set_seed(seed: int) -> None:
    """Of the global generators; 0 ≤ seed < 2⁶⁴."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)

"""The method and the spacing of ``method="auto"``: those with the least error by so many steps.

Measured by ``fastdiff compare`` on the networks of docs/methods_measured.md: on both together no
other is nearer by more than a tenth, but for iPNDM with "beta" in 20 steps (by a quarter), which is
far off in few. They draw no noise after x_T: the error is that of solving the ordinary differential
equation.
"""

import operator
from collections.abc import Sized
from typing import Any

from fastdiff.methods.protocol import noise_levels

# (up to so many steps, method, spacing)
RECOMMENDED = ((12, "unipc", "trailing"), (float("inf"), "unipc", "beta"))


def recommended(steps: int) -> tuple[str, str]:
    """(method, spacing) for so many steps."""
    return next((method, spacing) for most, method, spacing in RECOMMENDED if steps <= most)


def count_of(process: Any, steps: int | str | None, timesteps: Any) -> int:
    """How many of the process's steps Sampler's arguments ask for, or nearly: of sections their
    sum, of what is none of them 0: ``respace`` says so."""
    if timesteps is not None:
        return len(timesteps) if isinstance(timesteps, Sized) else 0
    if steps is None:
        return len(noise_levels(process)[0])
    if isinstance(steps, str):
        digits = [
            part for part in steps.removeprefix("ddim").split(",") if part.strip().isdecimal()
        ]
        return sum(map(int, digits))
    try:
        return operator.index(steps)
    except TypeError:
        return 0

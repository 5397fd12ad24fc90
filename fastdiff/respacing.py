"""Strided subsequences of timesteps (Nichol & Dhariwal 2021 section 4; DDIM, Song et al. 2020)."""

import operator
from collections.abc import Iterable

from fastdiff.errors import InputError


def space_timesteps(num_timesteps: int, sections: str | int | Iterable[int]) -> list[int]:
    """Choose timesteps out of 0 … num_timesteps - 1, ascending.

    ``sections`` is a step count (``50`` or ``"50"``), one count per equal section of the process
    (``[10, 15, 20]`` or ``"10,15,20"``), ``"ddimN"`` for N steps at an integer stride from 0, or
    ``""`` for every step. Counts spread a section's steps evenly and include its first and last
    (a count of 1 takes the first, 0 skips the section); the stride accumulates as a float and
    rounds half to even, as published, so that the same string names the same steps.

    Raises InputError for counts that do not fit, and for "ddimN" when no integer stride gives N.
    """
    num_timesteps = _count(num_timesteps, "the number of timesteps", minimum=1)
    if isinstance(sections, str):
        text = sections.strip()
        if not text:
            return list(range(num_timesteps))
        if text.startswith("ddim"):
            return _ddim_timesteps(num_timesteps, text)
        counts = [_parse(part, sections) for part in text.split(",")]
    elif isinstance(sections, Iterable):
        counts = [_count(count, "a section's step count") for count in sections]
    else:
        counts = [_count(sections, "the step count")]
    return _section_timesteps(num_timesteps, counts)


def _ddim_timesteps(num_timesteps: int, text: str) -> list[int]:
    wanted = _parse(text.removeprefix("ddim"), text)
    counts = [len(range(0, num_timesteps, stride)) for stride in range(1, num_timesteps + 1)]
    if wanted in counts:
        return list(range(0, num_timesteps, counts.index(wanted) + 1))
    nearest = sorted(sorted(set(counts), key=lambda count: abs(count - wanted))[:2])
    raise InputError(
        f"{text!r}: no integer stride takes exactly {wanted} of {num_timesteps} steps; "
        f"the nearest counts that work: {', '.join(map(str, nearest))}"
    )


def _section_timesteps(num_timesteps: int, counts: list[int]) -> list[int]:
    if not counts or sum(counts) == 0:
        raise InputError("the sections choose no timesteps: ask for at least one")
    size_per, extra = divmod(num_timesteps, len(counts))
    chosen: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = size_per + (1 if i < extra else 0)
        if count > size:
            raise InputError(
                f"cannot choose {count} steps from section {i + 1} of {len(counts)}, "
                f"which has {size} of the {num_timesteps} steps"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            chosen.append(start + round(position))
            position += stride
        start += size
    return chosen


def _parse(text: str, whole: str) -> int:
    try:
        return _count(int(text), "a step count")
    except ValueError:  # InputError is one as well: both mean the text names no count
        raise InputError(
            f"cannot read the respacing {whole!r}: expected a count such as '50', "
            "counts per section such as '10,15,20', or 'ddim50'"
        ) from None


def _count(value: int, what: str, minimum: int = 0) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise InputError(f"{what} must be an integer, got {value!r}") from None
    if count < minimum:
        raise InputError(f"{what} must be at least {minimum}, got {count}")
    return count

"""Which rows of a call run all of the network, and which a part, with what earlier rows kept.

Two things change little from one row to the next: what a U-Net's deep layers answer (DeepCache,
Ma et al. 2023, arXiv:2312.00858), and for guidance what the condition changes of the output. (The
unconditional output itself changes more: kept in place of the difference it leaves the digits'
samples two to four times as far from those of full guidance, at 25 and 50 steps of DDIM.)
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastdiff.checks import is_finite
from fastdiff.errors import InputError

Rows = int | Sequence[int]


class Extent(NamedTuple):
    """How much of the network a row runs: the deep layers too, or the shallow ones alone; for
    guidance both halves of the batch, or the conditional one alone."""

    deep: bool = True
    both: bool = True


WHOLE = Extent()


@dataclass(frozen=True)
class Reuse:
    """Reuse of a U-Net's deep features.

    ``rows``: those that run the whole network: every so many, the first being one, or their
    numbers. ``depth``: how many blocks at either end of the network the rows between run anew
    (``UNet.forward_cut``).

    InputError for what is no such number, or none.
    """

    rows: Rows
    depth: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", checked_rows("reuse", self.rows))
        object.__setattr__(self, "depth", _count("depth", self.depth))


def reuse_of(given: Any) -> Reuse | None:
    """Sampler's argument of that name."""
    return given if given is None or isinstance(given, Reuse) else Reuse(given)


def checked_rows(name: str, rows: Any) -> Rows:
    """InputError for what is neither a number nor numbers of rows."""
    if isinstance(rows, Sequence | np.ndarray) and not isinstance(rows, str):
        numbers = tuple(_count(f"a row of {name}", row, least=0) for row in rows)
        if list(numbers) != sorted(set(numbers)):
            raise InputError(f"{name} has rows {list(numbers)}; expected each once, ascending")
        return numbers
    return _count(name, rows)


def extents(
    guided: Sequence[bool], features: Rows | None, guidance: Rows | None, skipped: int = 0
) -> list[Extent]:
    """Of a call's rows, which begins ``skipped`` rows after the table does.

    ``guided``: whether each is run with guidance; ``features``, ``guidance``: the rows that run the
    deep layers and both halves; None is all. All is run, too, where a call or its guidance begins
    or ends: nothing that fits was kept.
    """
    deep, both = (_chosen(rows, len(guided), skipped) for rows in (features, guidance))
    begins = [i == 0 or guided[i] != guided[i - 1] for i in range(len(guided))]
    return [
        WHOLE if begin else Extent(d, b or not g)
        for begin, d, b, g in zip(begins, deep, both, guided, strict=True)
    ]


def _chosen(rows: Rows | None, count: int, skipped: int) -> list[bool]:
    if rows is None:
        return [True] * count
    if isinstance(rows, int):
        return [i % rows == 0 for i in range(count)]
    last, most = max(rows, default=0), count + skipped - 1
    if last > most:
        raise InputError(f"row {last} is to run whole; the table has rows 0 … {most}")
    return [i + skipped in rows for i in range(count)]


def quadratic_rows(count: int, whole: int, *, centre: float, power: float = 1.4) -> list[int]:
    """``whole`` of ``count`` rows, dense around the row ``centre``, where features change most.

    With u evenly spaced from −centre^(1/power) to (count − centre)^(1/power), the rows are
    centre + sign(u)·|u|^power, rounded down. Where several are one, the power is lowered until
    none are.

    InputError for numbers that leave no such rows.

    Source: Ma et al. 2023, arXiv:2312.00858, the non-uniform 1:N. (The published code takes the
    power of a negative u in complex numbers, whose real parts are almost evenly spaced: around a
    centre above 0 its rows are others.)
    """
    count, whole = _count("count", count), _count("whole", whole)
    if whole > count or not 0 <= centre <= count or not 1 <= power < np.inf:
        raise InputError(
            f"{whole} of {count} rows around row {centre} with power {power}; expected whole ≤ "
            "count, 0 ≤ centre ≤ count and power ≥ 1"
        )
    while True:
        ends = -(centre ** (1 / power)), (count - centre) ** (1 / power)
        u = np.linspace(*ends, whole + 1)[:-1]
        rows = np.floor(centre + np.sign(u) * np.abs(u) ** power + 1e-9).astype(int)
        if power == 1 or len(np.unique(rows)) == whole:
            return sorted({0, *rows.tolist()})
        power = max(1.0, power - 0.02)


def _count(name: str, value: Any, least: int = 1) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name} is {value!r}; expected an integer, {least} or more") from None
    if isinstance(value, bool) or number < least:
        raise InputError(f"{name} is {value!r}; expected an integer, {least} or more")
    return number


def rows_within(changes: NDArray[np.float64], threshold: float) -> list[int]:
    """The rows to run whole so that none reuses features that differ from its own by more than
    ``threshold``, the fewest of them.

    ``changes``: as of ``best_rows``. InputError for a threshold that is no number of 0 or more.
    """
    if not (is_finite(threshold) and threshold >= 0):
        raise InputError(f"threshold is {threshold!r}; expected a share of 0 or more")
    rows = [0]
    for i in range(1, len(changes)):
        if not changes[rows[-1], i] <= threshold:
            rows.append(i)
    return rows


def best_rows(changes: NDArray[np.float64], whole: int) -> list[int]:
    """``whole`` rows to run whole, row 0 among them, with the least change in all: the sum over the
    rows of what their features differ from those that were kept last.

    ``changes``: (K, K), how much the features of row j differ from row i's, read where i < j.
    Exact, by O(whole·K²) operations.

    InputError for as many rows as there are not.
    """
    count, whole = len(changes), _count("whole", whole)
    if whole > count:
        raise InputError(f"{whole} rows are to run whole; there are {count}")
    # since[i, j]: of the rows i + 1 … j − 1 on the features of row i.
    since = np.cumsum(np.triu(changes, 1), axis=1) - np.triu(changes, 1)
    since = np.concatenate([since, np.triu(changes, 1).sum(1)[:, None]], axis=1)
    since[np.tril_indices(count, 0)] = np.inf
    # best[j]: the least with row j the next to run whole, after as many as the loop has chosen.
    best = since[0]
    came_from = [np.zeros(count + 1, dtype=int)]
    for _ in range(whole - 1):
        through = best[:count, None] + since
        came_from.append(through.argmin(0))
        best = through.min(0)
    rows, j = [], count
    for chosen in came_from[::-1]:
        j = int(chosen[j])
        rows.append(j)
    return rows[::-1]

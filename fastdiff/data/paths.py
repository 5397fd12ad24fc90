"""Paths below one root, a million of them in some tens of megabytes.

A path object, or only its string, costs 100 bytes and more; here a name is its own bytes and 12
more, for where they end and which folder they lie in.
"""

from array import array
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import NamedTuple, TypeVar, overload

import numpy as np

T = TypeVar("T")
Parts = tuple[str, ...]  # a path below the root: folders, then the file's name


class Groups(NamedTuple):
    """Paths by what their classes can be read from: their folder, and their name before "_".

    examples: the first path of each group. counts: paths in each. of: int (N,), every path's group.
    """

    examples: list[Parts]
    counts: list[int]
    of: np.ndarray


class Lazy(Sequence[T]):
    """A sequence whose items are made when they are asked for: ``at(index)``, in [0, N)."""

    def at(self, index: int) -> T:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        chosen = range(len(self))[index]
        return self.at(chosen) if isinstance(chosen, int) else [self.at(i) for i in chosen]


class Chosen(Lazy[T]):
    """The items at int64 ``rows`` of another sequence."""

    def __init__(self, items: Sequence[T], rows: np.ndarray) -> None:
        self._items, self._rows = items, rows

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, index: int) -> T:
        return self._items[int(self._rows[index])]


class PathTable(Lazy[str]):
    """Paths like ``cat/0.png``, in the order in which they were added."""

    def __init__(self) -> None:
        self._folders: dict[str, int] = {}
        self._folder_names: list[str] = []
        self._folder_of = array("i")
        self._names = bytearray()
        self._ends = array("q", [0])

    def add(self, folder: str, names: Iterable[str]) -> None:
        """Files of one folder: "" for the root itself, or a path with "/" between its parts."""
        number = self._folders.setdefault(folder, len(self._folder_names))
        if number == len(self._folder_names):
            self._folder_names.append(folder)
        for name in names:
            self._names += name.encode("utf-8", "surrogateescape")  # it need not be text
            self._ends.append(len(self._names))
        self._folder_of.extend(repeat(number, len(self._ends) - 1 - len(self._folder_of)))

    def __len__(self) -> int:
        return len(self._folder_of)

    def at(self, index: int) -> str:
        folder = self._folder_names[self._folder_of[index]]
        return f"{folder}/{self.name(index)}" if folder else self.name(index)

    def name(self, index: int) -> str:
        """The last part of path ``index``, in [0, N)."""
        return self._name(index).decode("utf-8", "surrogateescape")

    def _name(self, index: int) -> bytearray:
        return self._names[self._ends[index] : self._ends[index + 1]]

    def groups(self, rows: np.ndarray) -> Groups:
        """The paths at ``rows`` as groups, in the order of their first paths."""
        numbers: dict[tuple[int, bytes], int] = {}
        examples: list[Parts] = []
        counts: list[int] = []
        of = np.empty(len(rows), np.int32)
        for place, row in enumerate(rows):
            before, underscore, _ = self._name(row).partition(b"_")
            key = self._folder_of[row], bytes(before + underscore if underscore else b"")
            number = numbers.setdefault(key, len(numbers))
            if number == len(examples):
                examples.append(tuple(self.at(row).split("/")))
                counts.append(0)
            counts[number] += 1
            of[place] = number
        return Groups(examples, counts, of)

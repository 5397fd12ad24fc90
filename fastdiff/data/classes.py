"""Classes are the same where their names are: what a data set's numbers mean to a network.

- By name, wherever both sides have names: a class of the data gets the number that the network
  has for that name, wherever it stands there. The data may lack classes, and may not add any.
- By number, where one side has numbers alone (a ``.npz`` without names; a network that was
  converted): class i is class i, and there must be equally many, since nothing else says that
  they are the same. Names that are numbers themselves at other places are refused.
"""

import copy
import unicodedata
from collections.abc import Sequence

import numpy as np

from fastdiff.data.dataset import ImageDataset, numbers
from fastdiff.data.text import listed, shown
from fastdiff.errors import InputError


def match_classes(
    dataset: ImageDataset,
    names: Sequence[str] | None,
    count: int | None,
    data: str = "the data set",
) -> ImageDataset:
    """The data set with its labels numbered as the network's classes are.

    Args:
        dataset: the data set; it stays as it is.
        names: the network's classes in their order; None if it has numbers alone.
        count: how many classes the network has; None for a network without.
        data: what to call the data set in an error.

    Returns:
        The data set itself without labels, or without classes in the network.

    Raises:
        InputError: classes that the network does not know.
    """
    if count is None or dataset.labels is None or dataset.class_names is None:
        return dataset
    if names is not None and len(names) != count:
        raise InputError(f"the network has {count} classes and names for {len(names)}")
    known = numbers(count) if names is None else list(names)
    mapping = renumber(
        dataset.class_names,
        known,
        np.unique(dataset.labels),
        by_number=names is None or (dataset.numbered and known != numbers(count)),
        ours=data,
        theirs="the network",
    )
    matched = copy.copy(dataset)  # the images are shared
    matched.labels = mapping[dataset.labels]
    matched.class_names, matched.num_classes = known, count
    return matched


def renumber(
    found: Sequence[str],
    known: Sequence[str],
    used: np.ndarray,
    *,
    by_number: bool,
    ours: str,
    theirs: str,
) -> np.ndarray:
    """int64 (len(found),): the number among ``known`` of every class of ``found``, by the rules
    above; -1 for one that is not ``used`` and not known.

    by_number: one side has no names. ours, theirs: what to call the two sides in an error.
    """
    if by_number:
        _check_by_number(found, known, ours, theirs)
        return np.arange(len(found))
    places = {form(name): number for number, name in enumerate(known)}
    mapping = np.array([places.get(form(name), -1) for name in found], dtype=np.int64)
    if unknown := [shown(found[i]) for i in used if mapping[i] < 0]:
        raise InputError(
            f"{ours} has classes that {theirs} does not know: {listed(unknown, 4)}; "
            f"{theirs} has {len(known)} classes: {listed([shown(name) for name in known], 8)}"
        )
    return mapping


def _check_by_number(found: Sequence[str], known: Sequence[str], ours: str, theirs: str) -> None:
    if len(found) != len(known):
        raise InputError(
            f"{ours} has {len(found)} classes; {theirs} was trained with {len(known)}, and one of "
            "them has no names to match"
        )
    for names in (found, known):
        for number, name in enumerate(names):
            if name.isascii() and name.isdecimal() and int(name) != number:
                raise InputError(
                    f"{ours} and {theirs}: one has class numbers alone, and for the other class "
                    f"'{shown(name)}' is number {number}, so {shown(name)} could mean either; "
                    "give both sides names (folders, or class_names in a .npz)"
                )


def form(name: str) -> str:
    """One of the ways in which Unicode writes the same name."""
    return unicodedata.normalize("NFC", name)

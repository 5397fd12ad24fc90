"""Labels as StyleGAN's and EDM's dataset_tool.py writes them beside the pictures: dataset.json."""

import json
from collections.abc import Callable, Iterable

import numpy as np

from fastdiff.data.labels import Refusal
from fastdiff.data.text import plain
from fastdiff.errors import first_line

NAME = "dataset.json"


def read_labels_of(paths: Iterable[str], read: Callable[[], bytes]) -> np.ndarray | Refusal | None:
    """int64 (N,): the label of every path, from ``{"labels": [["00000/img.png", 3], ...]}``.

    read: the file's content. None for a file of that name that is about something else.
    """
    try:
        content = json.loads(read())
    except (OSError, ValueError) as error:
        return Refusal(f"{NAME} cannot be read ({first_line(error)}): mend it, or move it away")
    if not isinstance(content, dict) or "labels" not in content:
        return None
    if content["labels"] is None:
        return Refusal(f"{NAME} holds no labels (null): write the set with labels")
    try:
        labels = dict(content["labels"])
    except (TypeError, ValueError):
        return Refusal(f"{NAME}: labels are no pairs, expected [[file, class number], ...]")
    numbers = []
    for path in paths:
        label = labels.get(path)
        if type(label) is not int or label < 0:
            return Refusal(_unusable(path, label, missing=path not in labels))
        numbers.append(label)
    return np.array(numbers, dtype=np.int64)


def _unusable(path: str, label: object, missing: bool) -> str:
    if missing:
        return f"{NAME} has no label for '{plain(path)}': expected one for every picture"
    wanted = "expected a class number from 0: write the set with such labels"
    if isinstance(label, list):
        return f"{NAME}: the label of '{plain(path)}' is a vector of {len(label)} values, {wanted}"
    return f"{NAME}: the label of '{plain(path)}' is {label!r:.40}, {wanted}"

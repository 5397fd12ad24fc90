"""The formats of image sets, by the files beside this one; no list names them."""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fastdiff.data.dataset import ImageDataset

CACHE_BYTES = 1 << 30  # a decoded set of at most this size stays in memory


@dataclass(frozen=True)
class Options:
    """The arguments of ``load_dataset``, checked; a format reads those that concern it."""

    image_size: int | None = None
    class_cond: bool | None = False
    random_flip: bool = False
    channels: int | None = None
    cache_bytes: int = CACHE_BYTES
    labels: str | None = None
    known_classes: Collection[str] = ()
    skip_broken: bool = False
    max_pixels: int | None = None


@dataclass(frozen=True)
class Format:
    """How a set is recognised and opened.

    name: for messages, such as "a .npz file". is_one: whether a path that exists is such a set; or
    it is the word that names the set, where no path leads to it. general: asked after the others.
    patterns: asked also about a path where nothing is, which may be a pattern of names.
    """

    name: str
    is_one: Callable[[Path], bool] | str
    load: Callable[[Path, Options], ImageDataset]
    general: bool
    patterns: bool

    def recognises(self, spec: str | os.PathLike[str], path: Path) -> bool:
        if isinstance(self.is_one, str):
            return spec == self.is_one  # a folder of that name is given as ./name
        return (self.patterns or path.exists()) and self.is_one(path)


FORMATS: list[Format] = []
Load = TypeVar("Load", bound=Callable[[Path, Options], ImageDataset])


def image_format(
    name: str,
    is_one: Callable[[Path], bool] | str,
    *,
    general: bool = False,
    patterns: bool = False,
) -> Callable[[Load], Load]:
    """Register the decorated function as the format's ``load``; InputError is its refusal."""

    def register(load: Load) -> Load:
        FORMATS.append(Format(name, is_one, load, general, patterns))
        FORMATS.sort(key=lambda known: known.general)
        return load

    return register

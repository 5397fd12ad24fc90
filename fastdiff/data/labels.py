"""The classes of a folder's images, read from where the files lie and what they are called.

    folders      the first-level sub-folder     cat/0.png
    subfolders   the second-level sub-folder    part0/cat/0.png
    parents      the folder an image lies in    part0/images/cat/0.png, however deep
    prefixes     the file's name before "_"     cat_0.png (improved-diffusion's rule)

Nothing here touches the disk: paths in, one reading or a refusal out.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from fastdiff.data.paths import Parts
from fastdiff.data.text import listed, plain, shown

WAYS = ("folders", "subfolders", "parents", "prefixes")
SPLIT = (
    r"(train|training|val|valid|validation|dev|test|testing|eval|evaluation|holdout)"
    r"([-_ ]?(set|data|images|[ab]|\d+))?"  # trainA and testB, val2017
)
SHARD = r"(part|shard|batch|fold|chunk|split)[-_ ]?\d+([-_ ]?of[-_ ]?\d+)?"
IS_SPLIT = re.compile(SPLIT, re.IGNORECASE)
MAY_BE_PART = re.compile(rf"(.*[-_ ])?({SPLIT}|{SHARD})", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Reading:
    """way: one of WAYS. names: the class of every path, in their order. counts: images of each
    path, where it is one for all that share folder and prefix."""

    way: str
    names: list[str]
    counts: Sequence[int] = field(default=(), compare=False)

    def __str__(self) -> str:
        images: Counter[str] = Counter()
        for name, count in zip(self.names, self.counts or [1] * len(self.names), strict=True):
            images[name] += count
        classes = [f"{shown(name)} {n:,}" for name, n in sorted(images.items())]
        return f"{self.way} ({listed(classes, 4)})"


@dataclass(frozen=True)
class Refusal:
    """Why there is no reading, and what to do: the end of a sentence."""

    reason: str


def read_labels(
    paths: Sequence[Parts],
    way: str | None = None,
    known: Collection[str] = (),
    counts: Sequence[int] = (),
) -> Reading | Refusal:
    """The one reading of these paths, or a refusal.

    counts: for how many images each path stands, all of one folder and prefix; () for one.
    way: the reading that was asked for, which counts if it gives every image a class.
    known: class names that a network has. Where several readings exist and the names of one
        alone are all known, that is the one; of several such, the one that has all of them.

    Otherwise, of the readings that give every image a class:

    - the folders are splits (``train`` and ``val``): refused, whatever else there is;
    - some images lie in sub-folders and some do not: refused, unless the folders say what the
      prefixes say;
    - two that differ: refused. A single prefix (``IMG_1.png``), a single deeper level
      (``cat/images/1.png``) and a deeper level or prefixes of splits (``cat/train/1.png``) are
      no classes and stand against nothing; nor does a single first-level folder called like a
      split (``train/cat_0.png``). Any other single folder is a class. Where some images lie
      deeper than others (``a/cat/0.png a/dog/1.png b/2.png``), the folders of those count;
    - the parents alone, and some images lie deeper than others: refused;
    - all classes may be splits or shards (``x_train`` and ``x_test``, ``part1`` and ``part2``):
      refused;
    - classes whose names differ in case alone: refused;
    - one: taken.
    """
    readings = _complete_readings(paths, counts)
    if way is not None:
        return readings.get(way) or Refusal(_missing(paths, way))
    if known:
        names = {unicodedata.normalize("NFC", name) for name in known}
        fitting = _different([r for r in readings.values() if names.issuperset(r.names)])
        if len(fitting) > 1:
            fitting = [r for r in fitting if names.issubset(r.names)]
        if len(fitting) == 1:
            return fitting[0]
    rivals = _different([r for r in readings.values() if _is_labelling(r, paths)])
    folders = readings.get("folders")
    if folders and len(_splits(folders.names)) >= 2:
        return Refusal(_about_parts(folders, rivals))
    uneven = folders is not None and len(set(map(len, paths))) > 1
    if len(rivals) > 1 or (uneven and rivals and rivals[0].way == "parents"):
        depths = "images lie at different depths, and " if uneven else ""
        choices = rivals if len(rivals) > 1 or folders is None else [folders, *rivals]
        return Refusal(
            f"{depths}the classes can be read in several ways: from "
            f"{' or from '.join(map(str, choices))}; choose with {_flags(choices)}"
        )
    reading = rivals[0] if rivals else readings.get("prefixes")
    if reading is None:
        return Refusal(_no_labels(paths))
    if reading.way == "prefixes" and (other := _in_another_folder(paths, reading)):
        return Refusal(
            f"some images lie in sub-folders, such as '{other}', and some do not, which leaves "
            f"open what the classes are: give them all folders, or take {reading} with "
            "--labels prefixes"
        )
    if _parts_of_a_set(reading):
        return Refusal(_about_parts(reading, [reading]))
    if pair := _same_but_for_case(reading.names):
        return Refusal(
            f"the classes '{plain(pair[0])}' and '{plain(pair[1])}' differ in case alone: rename "
            f"one, or take them for two with --labels {reading.way}"
        )
    return reading


def _complete_readings(paths: Sequence[Parts], counts: Sequence[int]) -> dict[str, Reading]:
    """The readings that give every image a class."""
    found = {}
    for way in WAYS:
        names = [_class(parts, way) for parts in paths]
        if names and all(names):
            found[way] = Reading(way, names, counts)
    return found


def _class(parts: Parts, way: str) -> str:
    """The class of one image; "" where this way gives none."""
    if way == "prefixes":
        prefix, underscore, _ = parts[-1].partition("_")
        name = prefix if underscore else ""
    elif way == "parents":
        name = parts[-2] if len(parts) > 1 else ""
    else:
        level = WAYS.index(way)
        name = parts[level] if len(parts) > level + 1 else ""
    return unicodedata.normalize("NFC", name)


def _is_labelling(reading: Reading, paths: Sequence[Parts]) -> bool:
    """Whether it says something by itself, with no one asking for it."""
    names = set(reading.names)
    if reading.way == "folders":
        return len(names) > 1 or not _splits(names)
    if reading.way == "parents":
        shallowest, deepest = min(map(len, paths)), max(map(len, paths))
        pairs = zip(reading.names, paths, strict=True)
        names = {n for n, parts in pairs if len(parts) > shallowest or shallowest == deepest}
    return len(names) > 1 and len(_splits(names)) < len(names)


def _splits(names: Collection[str]) -> list[str]:
    return sorted(name for name in set(names) if IS_SPLIT.fullmatch(name))


def _parts_of_a_set(reading: Reading) -> list[str]:
    """Those of its names that look like parts of a data set and not like classes."""
    names = sorted(set(reading.names))
    if len(splits := _splits(names)) >= 2:
        return splits
    return names if len(names) > 1 and all(map(MAY_BE_PART.fullmatch, names)) else []


def _different(readings: Sequence[Reading]) -> list[Reading]:
    """Without those that give every image the class that an earlier one gives it."""
    kept: list[Reading] = []
    for reading in readings:
        if all(reading.names != other.names for other in kept):
            kept.append(reading)
    return kept


def _in_another_folder(paths: Sequence[Parts], prefixes: Reading) -> str | None:
    """Where some images lie at the top: one in a folder that is not called like its prefix."""
    if all(len(parts) > 1 for parts in paths):
        return None
    for parts, name in zip(paths, prefixes.names, strict=True):
        if len(parts) > 1 and _class(parts, "folders") != name:
            return plain("/".join(parts))
    return None


def _same_but_for_case(names: Sequence[str]) -> tuple[str, str] | None:
    seen: dict[str, str] = {}
    for name in sorted(set(names)):
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            return other, name
    return None


def _flags(readings: Sequence[Reading]) -> str:
    return " or ".join(f"--labels {reading.way}" for reading in readings)


def _about_parts(reading: Reading, rivals: Sequence[Reading]) -> str:
    names = _parts_of_a_set(reading)
    choices = list(rivals) if reading in rivals else [reading, *rivals]
    first = f" (its folder '{shown(names[0])}')" if reading.way == "folders" else ""
    return (
        f"{listed([shown(name) for name in names], 4)} are called like the parts of a data set, "
        f"not like classes: give one part{first} as the data, or take the classes from "
        f"{' or from '.join(map(str, choices))} with {_flags(choices)}"
    )


def _no_labels(paths: Sequence[Parts]) -> str:
    def bare(parts: Parts) -> bool:
        return not _class(parts, "folders") and not _class(parts, "prefixes")

    example = next((p for p in paths if bare(p)), None)
    example = example or next(p for p in paths if not _class(p, "prefixes"))
    return (
        f"no labels for '{plain('/'.join(example))}': expected one sub-folder per class, or file "
        "names that start with the class and '_'"
    )


def _missing(paths: Sequence[Parts], way: str) -> str:
    without = next(parts for parts in paths if not _class(parts, way))
    wanted = {
        "folders": "lies in no sub-folder",
        "subfolders": "lies in no sub-folder of a sub-folder",
        "parents": "lies in no sub-folder",
        "prefixes": "has no name that starts with a class and '_'",
    }
    return f"--labels {way}: '{plain('/'.join(without))}' {wanted[way]}"

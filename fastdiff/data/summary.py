"""What opening a data set found, in a few lines however large it is."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fastdiff.data.text import counted, listed, plain, shown

MOST = 8  # sizes, modes or classes that are listed
NOT_ASKED = "not asked for"  # why no classes were taken


@dataclass
class Found:
    """What stood at the data's place.

    sizes: images by "WxH" as they are there. modes: by Pillow's mode, or by an array's channels.
    several: images that are the first of an animation or of several pages.
    skipped: files and folders that were passed over, with reasons. broken: a line for each.
    no_classes: why no classes were taken, where they might have been.
    """

    place: str
    sizes: Counter[str]
    modes: Counter[str]
    several: int = 0
    skipped: str = ""
    broken: list[str] = field(default_factory=list)
    no_classes: str = ""


def describe(
    found: Found,
    image_size: tuple[int, int],
    channels: int,
    labels: np.ndarray | None,
    class_names: Sequence[str] | None,
    reading: str | None,
) -> str:
    """Lines for a terminal: images, sizes, modes, classes, and what was left out."""
    used = f"{image_size[1]}x{image_size[0]}"
    brought = "" if list(found.sizes) == [used] else f"; brought to {used}"
    first = "; of animations and pages the first" if found.several else ""
    if any(mode.endswith(";16") and mode != "I;16" for mode in found.modes):
        first += "; colours of 16 bits cut to 8"
    lines = [
        f"{plain(found.place)}: {_plural(found.sizes.total(), 'image')}",
        f"  sizes    {counted(found.sizes, MOST)}{brought}",
        f"  modes    {counted(found.modes, MOST)}; read in {_plural(channels, 'channel')}{first}",
        f"  classes  {_classes(found, labels, class_names, reading)}",
    ]
    if found.skipped:
        lines.append(f"  skipped  {found.skipped}")
    if found.broken:
        lines.append(f"  broken   {len(found.broken):,}, left out: {listed(found.broken, 3)}")
    return "\n".join(lines)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _classes(
    found: Found,
    labels: np.ndarray | None,
    class_names: Sequence[str] | None,
    reading: str | None,
) -> str:
    if labels is None or class_names is None:
        return f"none taken: {found.no_classes}" if found.no_classes else "none"
    counts = np.bincount(labels, minlength=len(class_names))
    present = np.flatnonzero(counts)
    source = f", from {reading}" if reading else ""
    lowest, highest = counts[present].min(), counts[present].max()
    spread = f" ({lowest:,} to {highest:,} images each)" if len(present) > MOST else ""
    names = [f"{shown(class_names[i])} {counts[i]:,}" for i in present[: MOST + 1]]
    rest = f" and {len(present) - MOST:,} more" if len(present) > MOST else ""
    return f"{len(present):,}{source}{spread}: {', '.join(names[:MOST])}{rest}"

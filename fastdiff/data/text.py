"""Names and counts as a line can hold them."""

from collections import Counter
from collections.abc import Sequence

LONGEST = 40  # characters of a name that are shown


def plain(name: object) -> str:
    """A path or name that may hold line breaks, or bytes that are no text, in printable signs."""
    text = str(name)
    return text if text.isprintable() else "".join(map(_printable, text))


def shown(name: str) -> str:
    """``plain``, short enough for a list, and in quotes where a comma would divide it there."""
    name = plain(name)
    name = name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."
    return f'"{name}"' if "," in name else name


def _printable(sign: str) -> str:
    return sign if sign.isprintable() else repr(sign)[1:-1]


def listed(items: Sequence[str], most: int) -> str:
    """The items with commas between them, so many of them at most."""
    rest = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest


def counted(counts: Counter[str], most: int) -> str:
    """``RGB 12, L 3 and 2 more``, the most frequent first."""
    return listed([f"{shown(name)} {n:,}" for name, n in counts.most_common()], most)

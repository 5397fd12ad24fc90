"""Caches of launch plans."""

from typing import TypeVar

LARGEST_CACHE = 512
T = TypeVar("T")


def remember(cache: dict[tuple, T], key: tuple, value: T) -> T:
    """Put a launch plan into its cache, which starts afresh when it has grown large."""
    if len(cache) >= LARGEST_CACHE:
        cache.clear()
    cache[key] = value
    return value

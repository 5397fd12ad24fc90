"""Which of the collected tests a run takes: make check, make test or make test-all's."""

import random
from collections.abc import Iterator

everything = False  # set by conftest.py, before the tests are imported


def examples(some: int, of: int) -> int:
    """How many examples hypothesis draws: ``some`` in make test, all in make test-all."""
    return of if everything else some


def ordered(items: list) -> list:
    """Files with long tests first: of two processes none then waits for the other's at the end."""
    long = {item.path for item in items if item.get_closest_marker("long")}
    return sorted(items, key=lambda item: item.path not in long)


def chosen(items: list, *, quick: bool, everything: bool) -> list:
    left_out = set(beyond_sample(items))
    if not everything:
        items = [i for i in items if i not in left_out and not i.get_closest_marker("long")]
    if quick:
        unhurried = [item for item in items if not item.get_closest_marker("seconds")]
        first: dict[str, object] = {}
        for item in unhurried:
            first.setdefault(function(item), item)
        items = list(first.values())
    return items


def function(item) -> str:
    return item.nodeid.partition("[")[0]


def beyond_sample(items: list) -> Iterator:
    """The cases of functions marked sample(n) but n: the first, and others by chance."""
    cases: dict[str, list] = {}
    for item in items:
        if item.get_closest_marker("sample"):
            cases.setdefault(function(item), []).append(item)
    for of_one in cases.values():
        (count,) = of_one[0].get_closest_marker("sample").args
        # By chance, always the same: every so-many-th would meet one value of an inner parameter.
        kept = {0, *random.Random(0).sample(range(1, len(of_one)), min(count, len(of_one)) - 1)}
        yield from (item for i, item in enumerate(of_one) if i not in kept)

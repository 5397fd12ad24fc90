"""Counts instructions in what cuobjdump -sass prints of a kernel."""

import re

LINE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;")
BRANCH = re.compile(r"(@!?U?P\d+ )?BRA\S* (?:\S+, )?0x([0-9a-f]+)")


def instructions(code: str) -> list[tuple[int, str]]:
    """(address, instruction) of a kernel, without what it calls: the division of 64 bits."""
    lines = [(int(at, 16), what) for at, what in LINE.findall(code) if not what.startswith("NOP")]
    called = [int(at, 16) for at in re.findall(r"CALL\.REL\S* 0x([0-9a-f]+)", code)]
    return [line for line in lines if line[0] < min(called, default=2**32)]


def shortest_round(code: str, *, once: dict[str, int]) -> int:
    """The fewest instructions of a way through the kernel's longest loop on which each pattern of
    ``once`` is met as often as it says."""
    lines = instructions(code)
    at = {address: i for i, (address, _) in enumerate(lines)}
    targets = [(i, BRANCH.search(what)) for i, (_, what) in enumerate(lines)]
    jumps = {i: (at.get(int(m[2], 16)), m[1] is not None) for i, m in targets if m}
    back = [(to, i) for i, (to, _) in jumps.items() if to is not None and to < i]
    first, last = max(back, key=lambda loop: loop[1] - loop[0])

    patterns = [re.compile(pattern) for pattern in once]
    ways: dict[int, dict[tuple[int, ...], int]] = {first: {(0,) * len(patterns): 0}}
    for i in range(first, last + 1):
        reached = {}
        for met, length in ways.pop(i, {}).items():
            now = (n + bool(p.search(lines[i][1])) for n, p in zip(met, patterns, strict=True))
            reached[tuple(now)] = length + 1
        if i == last:
            return reached[tuple(once.values())]
        to, falls_through = jumps.get(i, (None, True))
        ends = "EXIT" in lines[i][1] and not lines[i][1].startswith("@")
        for after in {to} | ({i + 1} if falls_through and not ends else set()):
            if after is not None and i < after <= last:
                shorter = ways.setdefault(after, {})
                for met, length in reached.items():
                    shorter[met] = min(length, shorter.get(met, length))
    raise AssertionError("the loop has no end")

"""What the broken copies of the kernels have in common: each must be caught by a suite.

cuda_mutants.py, cpu_mutants.py and triton_mutants.py list them.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from subprocess import CompletedProcess
from typing import NamedTuple

import pytest


class Mutant(NamedTuple):
    what: str
    kernel: str
    file: str  # beside the others of its list
    before: str  # occurs once
    after: str  # in C++, BROKEN is true in the broken copy
    suite: tuple[str, ...]
    short: bool = False  # in make test


def replaced(source: str, before: str, after: str) -> str:
    assert source.count(before) == 1, f"write the mutation for what the kernel is now: {before}"
    return source.replace(before, after)


def with_switches(source: str, file: str, mutants: list[Mutant], number: str) -> str:
    """A file's text with the switches of the mutants in it; ``number``: the C++ variable that says
    which of them is closed, from 1 on."""
    for i, mutant in enumerate(mutants, 1):
        if mutant.file == file:
            after = mutant.after.replace("BROKEN", f"({number} == {i})")
            source = replaced(source, mutant.before, after)
    return source


def cases(mutants: list[Mutant]) -> list:
    """Of a test of each: in make test some of them."""
    return [
        pytest.param(
            mutant,
            marks=() if mutant.short else pytest.mark.long,
            id=f"{mutant.kernel}: {mutant.what}",
        )
        for mutant in mutants
    ]


def outcomes(
    mutants: list[Mutant], complete: bool, run: Callable[[Mutant], CompletedProcess]
) -> dict[Mutant, CompletedProcess]:
    """``run`` of every mutant that this run of the tests takes, as many at a time as there are
    processors."""
    chosen = [mutant for mutant in mutants if mutant.short or complete]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(chosen, pool.map(run, chosen), strict=True))


def check_caught(done: CompletedProcess, *signs: str) -> None:
    output = done.stdout + done.stderr
    assert done.returncode != 0, output[-3000:]
    assert any(sign in output for sign in signs), output[-3000:]


# By a wrong value or an error of the launch, or by a sanitizer, which ends the process.
BY_PYTEST = ("FAILED", "AddressSanitizer", "runtime error")

"""Broken copies of Triton's kernels, each of which the comparison with float64 must catch."""

import pytest

import mutants

pytest.importorskip("triton")
from triton_mutants import MUTANTS, run  # noqa: E402


@pytest.fixture(scope="module")
def outcomes(request):
    complete = request.config.getoption("--all")
    extent = "complete" if complete else "short"
    return mutants.outcomes(MUTANTS, complete, lambda mutant: run(mutant, extent))


@pytest.mark.seconds
@pytest.mark.parametrize("mutant", mutants.cases(MUTANTS))
def test_a_broken_kernel_is_caught(outcomes, mutant):
    mutants.check_caught(outcomes[mutant], "AssertionError")


@pytest.mark.long
def test_a_copy_with_nothing_broken_passes():
    done = run(None, "short")
    assert done.returncode == 0, done.stdout + done.stderr

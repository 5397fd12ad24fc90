"""Broken copies of the CUDA kernels, each of which the suites must catch in the emulation."""

import pytest

import mutants
from cuda_mutants import MUTANTS, environment


@pytest.fixture(scope="module")
def outcomes(request, sanitized):
    """Of every mutant its suite's process, in make test with the first case of every test."""
    complete = request.config.getoption("--all")
    extent = "--all" if complete else "--quick"

    def run(mutant):
        arguments = (extent, "-m", "any_backend", *mutant.suite)
        return sanitized.run_tests(*arguments, **environment(mutant))

    return mutants.outcomes(MUTANTS, complete, run)


@pytest.mark.seconds
@pytest.mark.parametrize("mutant", mutants.cases(MUTANTS))
def test_a_broken_kernel_is_caught(outcomes, mutant):
    mutants.check_caught(outcomes[mutant], *mutants.BY_PYTEST)

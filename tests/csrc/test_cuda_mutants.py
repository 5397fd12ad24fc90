"""Broken copies of the CUDA kernels, each of which the suites must catch in the emulation."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from mutants import MUTANTS, environment


@pytest.fixture(scope="module")
def outcomes(request, sanitized):
    """Of every mutant its suite's process, in make test with the first case of every test; as many
    run at a time as there are processors."""
    complete = request.config.getoption("--all")
    chosen = [mutant for mutant in MUTANTS if mutant.short or complete]
    extent = "--all" if complete else "--quick"

    def run(mutant):
        arguments = (extent, "-m", "any_backend", *mutant.suite)
        return sanitized.run_tests(*arguments, **environment(mutant))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(chosen, pool.map(run, chosen), strict=True))


@pytest.mark.seconds
@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(
            mutant,
            marks=() if mutant.short else pytest.mark.long,
            id=f"{mutant.kernel}: {mutant.what}",
        )
        for mutant in MUTANTS
    ],
)
def test_a_broken_kernel_is_caught(outcomes, mutant):
    done = outcomes[mutant]
    output = done.stdout + done.stderr
    assert done.returncode != 0, output[-3000:]
    # By a wrong value or an error of the launch, or by a sanitizer, which ends the process.
    caught = "FAILED" in output or "AddressSanitizer" in output or "runtime error" in output
    assert caught, output[-3000:]

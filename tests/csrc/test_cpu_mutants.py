"""Broken copies of the CPU's convolutions, each of which the suites must catch."""

import pytest

import mutants
from cpu_mutants import IN_TILES, MUTANTS, environment
from fastdiff.ops import native
from fastdiff.ops.convolution.fastest import Products

FILES = sorted({mutant.suite[0] for mutant in MUTANTS})
PLAIN = [isa for isa in native.library().supported_isas() if isa != "avx512"][-1]
HAS_TILES = native.library().convolution_serves(int(Products.SPLIT))


@pytest.fixture(scope="module")
def outcomes(request, sanitized):
    """Of every mutant its suite's process."""
    complete = request.config.getoption("--all")
    able = [mutant for mutant in MUTANTS if HAS_TILES or mutant.kernel not in IN_TILES]
    extent = ("--all",) if complete else ()
    isa = PLAIN if complete else "baseline"  # which is all that the short build has

    def run(mutant):
        arguments = (*extent, *mutant.suite)
        return sanitized.run_tests(*arguments, backend="", **environment(mutant, isa))

    return mutants.outcomes(able, complete, run)


@pytest.mark.seconds
@pytest.mark.parametrize("mutant", mutants.cases(MUTANTS))
def test_a_broken_kernel_is_caught(outcomes, mutant):
    if mutant not in outcomes:
        pytest.skip("this CPU has no tiles")
    mutants.check_caught(outcomes[mutant], *mutants.BY_PYTEST)


@pytest.mark.long
@pytest.mark.parametrize("isa", ["", PLAIN])
@pytest.mark.parametrize("file", FILES)
def test_with_nothing_broken_the_suites_hold(sanitized, file, isa):
    done = sanitized.run_tests("--all", file, backend="", FASTDIFF_ISA=isa)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

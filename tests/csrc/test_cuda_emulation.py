"""The CUDA kernels without a GPU: the accuracy suites on emulated threads, under the sanitizers."""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

SUITES = {  # the longest first
    "group_norm_silu": [
        "tests/ops/test_group_norm_silu.py",
        "tests/ops/test_group_norm_silu_backward.py",
    ],
    "group_norm_silu, cut": ["tests/ops/test_group_norm_silu_cuda.py"],
    "elementwise kernels, a network": [
        "tests/ops/test_elementwise_cuda.py",
        "tests/ops/test_named_network.py",
    ],
    "q_sample": ["tests/ops/test_q_sample.py", "tests/ops/test_q_sample_kernels.py"],
    "posterior_step": [
        "tests/ops/test_posterior_step.py",
        "tests/ops/test_posterior_step_kernels.py",
        "tests/ops/test_posterior_step_memory.py",
    ],
    "normal": ["tests/ops/test_rng_cuda.py"],
}
AS_ON_A_GPU = ("-p", "pretend_gpu", "-m", "any_backend")


@pytest.fixture(scope="module")
def outcomes(sanitized):
    """Every suite's process when it has ended; as many run at a time as there are processors."""

    def run(files):
        return sanitized.run_tests("--all", *AS_ON_A_GPU, *files)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(SUITES, pool.map(run, SUITES.values()), strict=True))


def passed(done) -> int:
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


@pytest.mark.long
@pytest.mark.parametrize("suite", SUITES)
def test_the_suite_holds_in_the_emulation(outcomes, suite):
    assert passed(outcomes[suite]) >= 10


@pytest.mark.seconds
def test_the_first_cases_of_the_kernels_own_suites_hold_in_the_emulation(sanitized):
    own = ("group_norm_silu, cut", "elementwise kernels, a network", "normal")
    files = [file for suite in own for file in SUITES[suite]]
    # A sampler's kernels are those of a network and of the elementwise suite: not once more.
    quick = ("--quick", "-k", "not sampler", *AS_ON_A_GPU)
    assert passed(sanitized.run_tests(*quick, *files)) >= 12

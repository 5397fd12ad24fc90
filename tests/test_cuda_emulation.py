"""The CUDA kernels without a GPU: the accuracy suites on emulated threads, under the sanitizers."""

import re

import pytest

SUITES = {
    "normal": ["tests/test_rng_cuda.py"],
    "group_norm_silu": [
        "tests/test_group_norm_silu.py",
        "tests/test_group_norm_silu_backward.py",
        "tests/test_group_norm_silu_cuda.py",
    ],
    "elementwise kernels": ["tests/test_elementwise_cuda.py"],
    "q_sample": ["tests/test_q_sample.py", "tests/test_q_sample_kernels.py"],
    "posterior_step": ["tests/test_posterior_step.py", "tests/test_posterior_step_kernels.py"],
}


@pytest.mark.slow
@pytest.mark.parametrize("operation", SUITES)
def test_the_suite_holds_in_the_emulation(sanitized, operation):
    done = sanitized.run_tests("-m", "any_backend", *SUITES[operation])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 10

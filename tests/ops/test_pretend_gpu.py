"""What would fail on a GPU by the tests' own fault fails here, on tensors taken for a GPU's."""

import os
import subprocess
import sys

import pytest
import torch

from paths import ROOT, TOOLS
from pretend_gpu import PretendGpu


@pytest.fixture(autouse=True)
def pretending():
    with PretendGpu():
        yield


def test_a_generator_of_the_cpu_is_refused():
    generator = torch.Generator()
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.randn(2, generator=generator)
    assert torch.randn(2, generator=generator, device="cpu").shape == (2,)


def test_numpy_is_refused_what_was_not_brought_to_the_cpu():
    x = torch.zeros(2).double()
    with pytest.raises(TypeError, match="NumPy"):
        x.numpy()
    for brought in (x.cpu(), x.to("cpu"), x[1:].sin().cpu()):
        brought.numpy()
    torch.zeros(2, device="cpu").numpy()


def test_tensors_of_both_devices_do_not_mix():
    x, mine = torch.zeros(2), torch.ones(2, device="cpu")
    for mixture in (lambda: x.sin() + mine, lambda: torch.equal(x, mine * 2)):
        with pytest.raises(RuntimeError, match="on a GPU and on the CPU"):
            mixture()
    assert (x + mine.to(torch.get_default_device())).sum() == 2
    assert (x + torch.tensor(1.0, device="cpu")).sum() == 2  # one element goes anywhere
    assert x.copy_(mine).sum() == 2


def run(*arguments):
    """pytest as ``make gpu-full`` has it but for the plugin."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "pretend_gpu", "--tb=short", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TOOLS)])},
    )


@pytest.mark.seconds
def test_the_suites_run_where_the_default_device_is_a_gpu():
    """Each file is imported; of the tests that take any backend, the first cases are run."""
    done = run("--quick", "-m", "any_backend", "tests/ops")
    assert done.returncode == 0, done.stdout[-6000:]

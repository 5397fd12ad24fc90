"""How OpenMP's threads wait: chosen by the command alone, before torch is loaded, unless set."""

import os
import subprocess
import sys

import pytest

from fastdiff import wait_policy
from fastdiff.wait_policy import CHOICE, VARIABLES, _is_command, choose
from paths import ROOT, TOOLS

UNSET = {name: value for name, value in os.environ.items() if name not in VARIABLES}

# A program that says what the environment holds when torch is imported, and in the end.
WATCHING = """
import os, sys

def say():
    print([os.environ.get(name) for name in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")])

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            say()

sys.meta_path.insert(0, Watch())
import fastdiff.cli
import torch
say()
"""


def at_torch(program, **settings):
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env={**UNSET, **settings}
    )
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first == last
    return first


@pytest.mark.seconds
def test_the_command_chooses_before_torch_is_loaded(tmp_path):
    script = tmp_path / "fastdiff"  # as the one that an install makes
    script.write_text(WATCHING)
    assert at_torch(script) == str([*CHOICE.values(), None])
    assert at_torch(script, OMP_WAIT_POLICY="active") == "[None, None, 'active']"


@pytest.mark.seconds
def test_a_program_of_its_own_keeps_its_environment(tmp_path):
    program = tmp_path / "fastdiff_study.py"
    program.write_text(WATCHING)
    assert at_torch(program) == "[None, None, None]"


@pytest.mark.parametrize(
    ("argv", "orig_argv", "command"),
    [
        (["/usr/bin/fastdiff", "info"], ["python3", "/usr/bin/fastdiff", "info"], True),
        (["-m", "info"], ["python3", "-m", "fastdiff", "info"], True),
        (["-m"], ["python3", "-u", "-mfastdiff"], True),  # torchrun's children are -u -m
        (["-m", "-m", "x"], ["python3", "-m", "fastdiff.cli", "-m", "x"], True),
        (["-m", "fastdiff"], ["python3", "-m", "pdb", "fastdiff"], False),
        (["-m", "-m", "fastdiff"], ["python3", "-m", "torch.distributed.run", "-m", "fastdiff"],
         False),
        (["train.py", "fastdiff"], ["python3", "train.py", "fastdiff"], False),
        (["-c"], ["python3", "-c", "import fastdiff"], False),
        ([""], ["python3"], False),
        ([], ["python3"], False),
    ],
)  # fmt: skip
def test_what_the_command_is(argv, orig_argv, command):
    assert _is_command(argv, orig_argv) is command


@pytest.mark.parametrize("name", VARIABLES)
def test_what_somebody_has_set_is_left_alone(name):
    environment = {name: "17"}
    choose(environment)
    assert environment == {name: "17"}


@pytest.mark.parametrize("environment", [{}, {"OMP_WAIT_POLICY": ""}, {"OMP_NUM_THREADS": "4"}])
def test_otherwise_the_choice_is_set(monkeypatch, environment):
    monkeypatch.setattr(wait_policy, "_chosen", False)
    before = dict(environment)
    choose(environment)
    assert environment == before | CHOICE


def test_described(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(wait_policy, "_chosen", False)
    assert wait_policy.described().startswith("the OpenMP runtime's own")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert wait_policy.described() == "OMP_WAIT_POLICY=passive (set in the environment)"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    for name in CHOICE:  # choose() writes to the real environment
        monkeypatch.setenv(name, "")
    choose()
    assert wait_policy.described() == "GOMP_SPINCOUNT=1000 KMP_BLOCKTIME=1 (fastdiff's choice)"


def test_the_tests_and_the_demo_take_the_same_choice():
    assert any(os.environ.get(name) for name in VARIABLES)
    for path in (ROOT / "Makefile", ROOT / ".ci" / "nightly", TOOLS / "sanitized.py"):
        assert not any(name in path.read_text() for name in VARIABLES)

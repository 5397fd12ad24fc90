"""``fastdiff info`` prints on every machine, also where something is missing or broken."""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import types

import pytest
import torch

from fastdiff import wait_policy
from fastdiff.commands import info
from fastdiff.ops import native


def printed(capsys, **options):
    assert info.run(argparse.Namespace(**{"json": False, **options})) == 0
    return capsys.readouterr().out


def test_text_has_every_section(capsys):
    text = printed(capsys)
    for line in ("versions", "cpu", "cuda", "native"):
        assert f"\n{line}\n" in f"\n{text}"
    assert torch.__version__ in text
    assert native.library().current_isa() in text
    assert native.build_info()["compiler"] in text


def test_json_is_the_same_information(capsys):
    sections = json.loads(printed(capsys, json=True))
    assert sections == info.collect()
    assert sections["versions"]["torch"] == torch.__version__
    assert sections["native"]["isas that run here"] == native.library().supported_isas()
    assert sections["cpu"]["torch threads"] == torch.get_num_threads()
    assert sections["cpu"]["waiting threads"] == wait_policy.described()
    assert sections["cpu"]["openmp"]
    assert sections["cpu"]["model"]


@pytest.fixture
def unloaded():
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_a_missing_native_library_is_a_line(unloaded, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastdiff._native", None)
    text = printed(capsys)
    assert "native library cannot be loaded" in text
    assert torch.__version__ in text


def test_a_forced_instruction_set_that_cannot_run_is_a_line(unloaded, monkeypatch, capsys):
    monkeypatch.setenv("FASTDIFF_ISA", "sse9")
    assert "FASTDIFF_ISA is 'sse9'" in printed(capsys)


def test_a_missing_package_is_none(monkeypatch, capsys):
    real = importlib.metadata.version

    def version(name):
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert info.collect()["versions"]["triton"] is None
    assert "triton              none" in printed(capsys)


def test_devices_are_listed(monkeypatch):
    device = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=139 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(native, "cuda_driver_version", lambda: 12080)
    cuda = info.collect()["cuda"]
    assert cuda["devices"] == ["0: NVIDIA H200, sm_90, 139 GiB"]
    assert cuda["driver serves"] == "CUDA 12.8"


@pytest.mark.seconds
def test_the_command_line_prints_it():
    done = subprocess.run(
        [sys.executable, "-m", "fastdiff", "info", "--json"],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k not in wait_policy.VARIABLES},
    )
    assert done.returncode == 0, done.stderr
    sections = json.loads(done.stdout)
    assert sections["versions"]["torch"] == torch.__version__
    chosen = " ".join(f"{name}={value}" for name, value in wait_policy.CHOICE.items())
    assert sections["cpu"]["waiting threads"] == f"{chosen} (fastdiff's choice)"

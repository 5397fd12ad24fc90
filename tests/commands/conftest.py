from pathlib import Path

import numpy as np
import pytest

from parts_tools import SMALL, count_drawn, sample, save_network


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- fastdiff train


@pytest.fixture
def images(tmp_path) -> Path:
    """24 images of 8x8 in three classes."""
    rng = np.random.default_rng(0)
    path = tmp_path / "images.npz"
    np.savez(path, rng.integers(0, 256, (24, 8, 8, 3), np.uint8), np.arange(24) % 3)
    return path


# --- fastdiff sample in parts: a network, what one undisturbed run leaves, and what was drawn


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp("network") / "ckpt", seed=0)


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """What one undisturbed run leaves, with a trajectory that reaches into the second batch."""
    out = tmp_path_factory.mktemp("whole")
    assert sample(checkpoint, out, *SMALL, "--trajectory", "6") == 0
    return out


@pytest.fixture
def drawn(monkeypatch):
    return count_drawn(monkeypatch)

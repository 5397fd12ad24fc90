import pytest

from parts_tools import SMALL, count_drawn, sample, save_network


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


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

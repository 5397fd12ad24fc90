"""The papers' scores by several processes, killed and started again: those of one."""

import json
import signal

import numpy as np
import pytest

from fastdiff.cli import main
from fastdiff.evaluation.features import NETWORKS
from score_tools import NAME, Pixels, asked, command

pytestmark = pytest.mark.seconds


@pytest.fixture
def sets(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("fake", 22), ("real", 30)):
        np.savez(tmp_path / f"{name}.npz", rng.integers(0, 256, (count, 4, 4, 3), np.uint8))
    return ["--samples", str(tmp_path / "fake.npz"), "--data", str(tmp_path / "real.npz")]


def test_ranks_that_were_killed_go_on_and_give_the_scores_of_one(
    sets, start, tmp_path, monkeypatch
):
    def argv(name):
        return [
            "evaluate", *sets, "--device", "cpu", "--metrics", "fid,sfid,is,kid,prc,near",
            "--features", NAME, "--feature-batch", "3", "--features-dir", str(tmp_path / name),
            "--out", str(tmp_path / f"{name}.json"),
        ]  # fmt: skip

    monkeypatch.setitem(NETWORKS, NAME, lambda weights, resize: Pixels())
    assert main(argv("one")) == 0

    first, second = tmp_path / "first", tmp_path / "second"
    codes, log = start(2, command(argv("two"), first, dies_at=3)).finish()
    assert codes == [2, -signal.SIGKILL], log
    assert log.count("fastdiff evaluate: error: ") == 1 and "lost rank 1 of 2" in log
    done = int(np.load(tmp_path / "two" / "samples" / "done.npy").sum())
    assert done == 6 + 11 and not (tmp_path / "two" / "real").exists()

    codes, log = start(2, command(argv("two"), second)).finish()
    assert codes == [0, 0], log
    assert sum(asked(second).values()) == 22 - done + 30 and set(asked(second)) == {0, 1}
    found = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    assert found[0] == found[1]
    assert "features of samples:   0%|          | 0/3 [" in log  # of rank 0's share
    assert "features of real:   0%|          | 0/15 [" in log and log.count("features of real") == 1

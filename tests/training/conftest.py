"""A data set and the run of one process on it, which those of several are compared with."""

import pickle

import numpy as np
import pytest

from fastdiff.cli import main
from rank_runs import command


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """CIFAR-10 as it is distributed, with few images."""
    folder = tmp_path_factory.mktemp("data") / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(1, 6):
        labels = rng.permutation(10).tolist()
        data = rng.integers(0, 256, (10, 3072), np.uint8)
        batch = {b"data": data, b"labels": labels, b"batch_label": b"", b"filenames": []}
        (folder / f"data_batch_{number}").write_bytes(pickle.dumps(batch, protocol=4))
    names = [f"c{i}".encode() for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=4))
    return folder


@pytest.fixture(scope="module")
def alone(cifar, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    assert main(command(cifar, run)) == 0
    assert len(list((run / "averages").rglob("*.safetensors"))) == 3
    return run

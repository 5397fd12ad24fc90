"""CIFAR-10 as it is distributed."""

import os
import pickle

import numpy as np
import pytest

from fastdiff.data import load_dataset
from fastdiff.data.formats.cifar10 import CIFAR10_CLASSES
from fastdiff.errors import InputError


def cifar_batch(count, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), np.uint8), rng.integers(0, 10, count).tolist()


def write_cifar(folder, kind, batches):
    folder.mkdir()
    for number, (pixels, labels) in enumerate(batches, start=1):
        if kind == "bin":
            records = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)
            (folder / f"data_batch_{number}.bin").write_bytes(records.tobytes())
        else:
            batch = {b"batch_label": b"training", b"labels": labels, b"data": pixels}
            with (folder / f"data_batch_{number}").open("wb") as stream:
                pickle.dump(batch, stream, protocol=2)


@pytest.mark.parametrize("kind", ["py", "bin"])
def test_cifar10(kind, tmp_path):
    batches = [cifar_batch(3, 1), cifar_batch(2, 2)]
    folder = tmp_path / f"cifar-10-batches-{kind}"
    write_cifar(folder, kind, batches)
    dataset = load_dataset(folder, class_cond=True)
    assert len(dataset) == 5 and dataset.image_size == (32, 32) and dataset.channels == 3
    assert dataset.class_names == CIFAR10_CLASSES
    assert dataset.labels.tolist() == batches[0][1] + batches[1][1]
    assert np.array_equal(dataset[4][0].numpy().ravel(), batches[1][0][1])
    one = load_dataset(folder / ("data_batch_2" + (".bin" if kind == "bin" else "")))
    assert len(one) == 2


def test_cifar10_as_python_2_wrote_it(tmp_path):
    """Python 2's protocol-2 opcodes: byte strings (SHORT_BINSTRING), numpy.core's old name."""
    pixels = bytes(range(256)) * 12
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    stream = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        b"K\x00\x85U\x01b\x87R(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00"
        + pixels
        + b"tbU\x06labels]K\x07au."
    )
    (folder / "data_batch_1").write_bytes(stream)
    dataset = load_dataset(folder, class_cond=True)
    assert dataset.labels.tolist() == [7]
    assert dataset[0][0].numpy().tobytes() == pixels


class Malicious:
    def __reduce__(self):
        return os.system, ("touch unpickled",)


def test_cifar10_pickle_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Malicious()}, protocol=2))
    with pytest.raises(InputError, match="data_batch_1.*system"):
        load_dataset(folder)
    assert not (tmp_path / "unpickled").exists()


def test_damaged_cifar10(tmp_path):
    for kind in ("py", "bin"):
        folder = tmp_path / kind
        write_cifar(folder, kind, [cifar_batch(2, 0)])
        file = next(folder.iterdir())
        file.write_bytes(file.read_bytes()[:-40])
        with pytest.raises(InputError, match="data_batch_1"):
            load_dataset(folder)
        write_cifar(tmp_path / f"{kind}2", kind, [cifar_batch(2, 0)] * 2)
        (tmp_path / f"{kind}2" / file.name).write_bytes(file.read_bytes())
        whole = load_dataset(tmp_path / f"{kind}2", skip_broken=True)
        assert len(whole) == 2 and "broken   1, left out: " in whole.describe()
    write_cifar(tmp_path / "gap", "bin", [cifar_batch(2, 0)] * 3)
    (tmp_path / "gap" / "data_batch_2.bin").unlink()
    with pytest.raises(InputError, match="lacks data_batch_2.bin"):
        load_dataset(tmp_path / "gap")
    write_cifar(tmp_path / "labels", "bin", [(cifar_batch(2, 0)[0], [3, 11])])
    with pytest.raises(InputError, match="labels run from 3 to 11"):
        load_dataset(tmp_path / "labels")
    write_cifar(tmp_path / "shape", "py", [(np.zeros((2, 100), np.uint8), [3, 1])])
    with pytest.raises(InputError, match=r"uint8 \(2, 100\)"):
        load_dataset(tmp_path / "shape")

"""Training on images of 16 bits and on floats."""

import json

import numpy as np
import pytest

from fastdiff import evaluation
from fastdiff.data import ArrayDataset
from fastdiff.errors import InputError
from fastdiff.training import TrainConfig, Trainer
from training_tools import SETTINGS, make_dataset, make_diffusion, make_model

BYTES = make_dataset().images.permute(0, 2, 3, 1).numpy()
SAME = {
    "uint16": BYTES.astype(np.uint16) * 257,  # 65535 is 255 * 257
    "float32": BYTES.astype(np.float32) / 127.5 - 1,
}


def losses(images, run_dir):
    data = ArrayDataset(images, labels=np.arange(24) % 3)
    config = TrainConfig(**{**SETTINGS, "steps": 3, "log_every": 1})
    Trainer(make_model(), make_diffusion(), data, config, run_dir, progress=False).fit()
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.seconds
def test_the_same_values_train_the_same(tmp_path):
    expected = losses(BYTES, tmp_path / "uint8")
    assert len(expected) == 3
    assert losses(SAME["float32"], tmp_path / "float32") == expected
    assert losses(SAME["uint16"], tmp_path / "uint16") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", SAME)
def test_what_counts_in_bytes_refuses_them(dtype, tmp_path):
    data = ArrayDataset(SAME[dtype], labels=np.arange(24) % 3)
    config = TrainConfig(**{**SETTINGS, "nll_every": 5})
    with pytest.raises(InputError, match=f"nll_every, .*needs images of 8 bits .*torch.{dtype}"):
        Trainer(make_model(), make_diffusion(), data, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=f"comparison with samples needs .*torch.{dtype}"):
        evaluation.evaluate(BYTES, data)

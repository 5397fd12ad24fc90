"""``fastdiff train --config``: what a file says, and what a run leaves to start it again."""

import json
import math
import tomllib

import numpy as np
import pytest
import safetensors.torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff import cli
from fastdiff.checkpoints.run_directory import list_checkpoints
from fastdiff.training.toml import to_toml

QUICK = """
[train]
batch_size = 4
steps = 2
log_every = 1
warmup = 0
tensorboard = false
ema = []
betas = [0.8, 0.9]
[model]
model_channels = 32
channel_mult = [1]
attention_resolutions = []
dropout = 0.1
[diffusion]
diffusion_steps = 8
learn_sigma = true
"""


@pytest.fixture
def images(folder):
    np.savez(
        folder / "a 'b'.npz", np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
    )
    return folder / "a 'b'.npz"


def train(*arguments):
    return cli.main(["train", "--device", "cpu", "--quiet", *map(str, arguments)])


def settings(run):
    return json.loads((run / "config.json").read_text())


@pytest.mark.seconds
def test_a_file_says_what_flags_say_and_flags_override_it(folder, images):
    (folder / "run.toml").write_text(f'[data]\ndata = "{images}"\nskip_broken = false\n{QUICK}')
    assert train("--config", "run.toml", "--out", "a", "--steps", "1", "--flip") == 0
    found = settings(folder / "a")
    train_part, model = found["train"], found["model"]
    assert (train_part["steps"], train_part["flip"], train_part["batch_size"]) == (1, True, 4)
    assert (train_part["ema"], train_part["betas"]) == ([], [0.8, 0.9])
    assert (model["channel_mult"], model["attention_resolutions"]) == ([1], [])
    assert model["out_channels"] == 2  # with learn_sigma


@pytest.mark.seconds
def test_the_file_a_run_leaves_starts_the_same_run(folder, images):
    (folder / "mine.toml").write_text(f'preset = "digits"\n{QUICK}')
    flags = ["--data", images, "--lr", "0.00017", "--min-snr", "4", "--no-use-scale-shift-norm"]
    assert train("--config", "mine.toml", *flags, "--out", "a") == 0
    assert train("--config", "a/run.toml", "--out", "b") == 0
    assert (folder / "a/run.toml").read_text() == (folder / "b/run.toml").read_text()
    assert settings(folder / "a") == settings(folder / "b")
    a, b = (
        safetensors.torch.load_file(list_checkpoints(folder / run)[-1] / "model.safetensors")
        for run in "ab"
    )
    assert all(a[name].equal(b[name]) for name in a)
    assert train("--config", "a/run.toml", "--out", "a", "--resume", "--steps", "3") == 0
    assert tomllib.loads((folder / "a/run.toml").read_text())["train"]["steps"] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nlearning_rate = 1\n", "run.toml: [train] learning_rate is no setting"),
        ("[model]\nlr = 1\n", "run.toml: [model] lr is no setting"),
        ("lr = 1\n", "run.toml: lr is no setting"),
        ("[trian]\nlr = 1\n", "unknown table [trian]; expected [data], [train], [model], [diff"),
        ('[train]\nlr = "high"\n', "[train] lr is 'high': --lr: invalid float value: 'high'"),
        ("[train]\nsteps = true\n", "[train] steps is True: --steps: expected one argument"),
        ("[train]\nsteps = {a = 1}\n", "[train] steps is {'a': 1}: expected a number, text"),
        ('[train]\nlr_schedule = "step"\n', "--lr-schedule: invalid choice: 'step'"),
        ("[train]\nlr = 0\n", "lr is 0.0, expected a positive number"),
        ("[train\n", "run.toml is no TOML: "),
    ],
)
def test_what_a_file_cannot_say_is_one_line(folder, images, capsys, text, message):
    (folder / "run.toml").write_text(text)
    assert train("--data", images, "--config", "run.toml", "--out", "a") == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (folder / "a").exists()


def test_a_missing_file_is_one_line(folder, capsys):
    assert train("--config", "none.toml", "--out", "a") == 2
    assert "No such file or directory: 'none.toml'" in capsys.readouterr().err


VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)


@given(st.dictionaries(st.sampled_from("abc"), VALUES | st.lists(VALUES), max_size=3), VALUES)
def test_what_is_written_is_read_back(table, value):
    document = {"x": value, "table": table, "empty": {}}
    found = tomllib.loads(to_toml({**document, "none": None}))
    assert found == document
    if isinstance(value, float):
        assert math.copysign(1, found["x"]) == math.copysign(1, value)

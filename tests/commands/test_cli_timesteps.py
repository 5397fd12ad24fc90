"""fastdiff timesteps, and what takes its file; the steps' options of fastdiff sample."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.cli import main
from fastdiff.commands.named_values import named_values
from fastdiff.errors import InputError
from fastdiff.sampling.sampler import Sampler
from parts_tools import save_network

SMALL = ["--num", "2", "--fine-steps", "12", "--budget", "40", "--steps", "3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp("network"), 0)


@pytest.fixture
def taken(monkeypatch):
    """The timesteps of the samplers that are made, noisiest first."""
    seen = []
    made = Sampler.__init__

    def init(self, *args, **kwargs):
        made(self, *args, **kwargs)
        seen.append((self.table.method, self.table.timesteps.tolist()))

    monkeypatch.setattr(Sampler, "__init__", init)
    return seen


def measure(checkpoint, out, *flags):
    return main(["timesteps", "--checkpoint", str(checkpoint), "--out", str(out), *SMALL, *flags])


def sample(checkpoint, out, *flags):
    base = ["sample", "--checkpoint", str(checkpoint), "--num", "2", "--no-pngs"]
    return main([*base, "--out", str(out), *flags])


def test_a_file_is_measured_and_sampled_by(checkpoint, tmp_path, capsys, taken):
    file = tmp_path / "made" / "t.json"
    assert measure(checkpoint, file) == 0
    told = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert len(found["timesteps"]) == 3 and found["calls"] <= 40
    assert found["error"] <= min(found["by_spacing"].values())
    assert f"measured: error {found['error']:.4g}, after {found['calls']} network calls" in told
    taken.clear()
    flags = ["--timesteps", str(file), "--method", "dpmsolver++"]
    assert sample(checkpoint, tmp_path / "a", *flags) == 0
    ((method, timesteps),) = taken
    assert method == "dpmsolver++"
    np.testing.assert_allclose(timesteps[::-1], found["timesteps"], rtol=1e-5, atol=1e-5)
    capsys.readouterr()
    assert sample(checkpoint, tmp_path / "a", "--timesteps", str(file)) == 2
    assert "measured for method 'dpmsolver++', not for 'ddpm': take" in capsys.readouterr().err
    assert sample(checkpoint, tmp_path / "b", *flags, "--steps", "5") == 2
    assert "--timesteps says which steps are taken" in capsys.readouterr().err
    for text, message in (("{}", "holds no measured timesteps"), (None, "cannot read")):
        file.write_text(text) if text else file.unlink()
        assert sample(checkpoint, tmp_path / "b", *flags) == 2
        assert message in capsys.readouterr().err


def test_of_another_process_it_is_refused(checkpoint, tmp_path, capsys):
    file = tmp_path / "t.json"
    assert measure(checkpoint, file) == 0
    found = json.loads(file.read_text())
    found["noise_scale"][1] *= 1.01
    file.write_text(json.dumps(found))
    flags = ["--timesteps", str(file), "--method", "dpmsolver++"]
    assert sample(checkpoint, tmp_path / "a", *flags) == 2
    assert "with other noise levels than this process's" in capsys.readouterr().err


def test_a_spacing_has_its_options(checkpoint, tmp_path, capsys, taken):
    flags = ["--steps", "4", "--spacing", "karras", "--method", "ddim", "--spacing-option"]
    assert sample(checkpoint, tmp_path / "a", *flags, "rho=3") == 0
    assert sample(checkpoint, tmp_path / "b", *flags, "rounded=True") == 0
    (_, exact), (_, rounded) = taken
    assert any(step % 1 for step in exact) and not any(step % 1 for step in rounded)
    capsys.readouterr()
    assert sample(checkpoint, tmp_path / "c", *flags, "alpha=3") == 2
    assert "'alpha=3'; of --spacing karras is rho=…, rounded=…" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps", "1"], "steps is 1; expected an integer, 2 or more"),
        (["--budget", "13"], "budget is 13 network calls"),
        (["--method", "ddpm"], "method 'ddpm' draws noise"),
        (["--num", "0"], "--num is 0; expected 1 or more"),
        (["--method-option", "order=2"], "of --method dpmsolver++ is "),
    ],
)
def test_what_cannot_be_measured(checkpoint, tmp_path, capsys, flags, message):
    assert measure(checkpoint, tmp_path / "t.json", *flags) == 2
    err = capsys.readouterr().err
    assert message in err and not (tmp_path / "t.json").exists()


def test_guidance_and_method_options_change_what_is_measured(checkpoint, tmp_path, capsys):
    found = []
    for flags in (
        [],
        ["--guidance-scale", "3"],
        ["--method", "unipc", "--method-option", "order=1"],
    ):
        assert measure(checkpoint, tmp_path / "t.json", *flags) == 0
        found.append(json.loads((tmp_path / "t.json").read_text())["by_spacing"]["karras"])
    assert len(set(found)) == 3


def test_a_cascade_takes_steps(checkpoint, tmp_path, capsys):
    flags = ["--cascade", f"{checkpoint},{checkpoint}", "--timesteps", "t.json"]
    assert main(["sample", *flags, "--out", str(tmp_path / "a")]) == 2
    assert "--timesteps are of one network, by --checkpoint" in capsys.readouterr().err


def test_a_folder_is_no_file(checkpoint, tmp_path, capsys):
    assert measure(checkpoint, tmp_path) == 2
    assert "is a folder; expected a file, such as" in capsys.readouterr().err


VALUES = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans())


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from(["rho", "beta", "rounded"]), VALUES))
def test_values_are_read_as_they_are_written(values):
    texts = [f"{name}={value!r}" for name, value in values.items()]
    found = named_values("--x-option", texts, "--x y", ["rho", "beta", "rounded"])
    assert found == (values or None)
    with pytest.raises(InputError, match="--x-option is 'rho'; of --x y is rho=…"):
        named_values("--x-option", ["rho"], "--x y", ["rho"])
    with pytest.raises(InputError, match="of --x y is none that there is"):
        named_values("--x-option", ["rho=1"], "--x y", [])

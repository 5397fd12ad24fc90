"""Results are written before they are printed, over nothing but results, and printing never fails
for a character or for a reader that has gone."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastdiff import cli, ranks
from fastdiff.commands.output import safe_output
from fastdiff.errors import InputError
from fastdiff.images import save_samples_npz
from fastdiff.training.boards import TensorBoard
from parts_tools import SMALL, save_network

ENCODINGS = ["ascii", "latin-1", "cp1252", "utf-8"]


class Terminal(io.TextIOWrapper):
    """A stream of that encoding, which refuses what it lacks."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict")

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


@pytest.fixture
def terminal(monkeypatch):
    def open_terminal(encoding: str) -> tuple[Terminal, Terminal]:
        streams = Terminal(encoding), Terminal(encoding)
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        return streams

    return open_terminal


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint, images of its kind and samples."""
    folder = tmp_path_factory.mktemp("output")
    save_network(folder / "ckpt", seed=0)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 8, 8, 1), np.uint8)
    np.savez(folder / "images.npz", pixels, np.arange(12) % 3)
    save_samples_npz(folder / "fake.npz", pixels, np.arange(12) % 3)
    return folder


def command(name: str, folder: Path, out: Path) -> list[str]:
    images = str(folder / "images.npz")
    scored = ["nll", "--checkpoint", str(folder / "ckpt"), "--data", images, "--respacing", "2"]
    fake = ["evaluate", "--samples", str(folder / "fake.npz"), "--data", images]
    return {
        "nll": [*scored, "--num", "2", "--device", "cpu", "--out", str(out)],
        "evaluate": [*fake, "--classifier-steps", "1", "--out", str(out)],
        "sample": ["sample", "--checkpoint", str(folder / "ckpt"), "--out", str(out), *SMALL],
        "info": ["info"],
        "help": ["train", "--help"],
        "bench": ["bench", "--seconds", "1e-9", "--batch", "1"],
    }[name]


def run(arguments: list[str]) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        assert stop.code == 0
        return 0


@pytest.mark.sample(6)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["nll", "evaluate", "sample", "info", "help"])
def test_no_encoding_ends_a_command(folder, tmp_path, terminal, name, encoding):
    out, _ = terminal(encoding)
    place = tmp_path / ("é…±" if name == "sample" else "report.json")
    assert run(command(name, folder, place)) == 0
    text = out.text()
    if name == "nll":
        assert ("+/-" if encoding == "ascii" else "±") in text
        assert ("…" if encoding in ("cp1252", "utf-8") else "...") in text
    if name in ("nll", "evaluate"):
        assert json.loads(place.read_text())
    assert out.errors == "strict"  # as it was


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_are_no_text(tmp_path, terminal, encoding):
    """A name on the disk is bytes; Python carries those that are no UTF-8 as surrogates."""
    _, error = terminal(encoding)
    name = os.fsdecode(b"caf\xe9\xff")
    missing = str(tmp_path / name)
    assert cli.main(["nll", "--checkpoint", missing, "--data", "digits"]) == 2
    assert error.text().count("\n") == 1 and r"caf\udce9\udcff" in error.text()


def test_what_the_user_chose_for_such_characters_stays(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    monkeypatch.setattr(sys, "stdout", stream)
    with safe_output():
        print("±")
    stream.flush()
    assert stream.buffer.getvalue() == b"?\n"


class Gone(io.StringIO):
    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.failing = error

    def write(self, text: str) -> int:
        raise self.failing


def test_a_reader_that_has_gone_costs_nothing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Gone(BrokenPipeError(32, "Broken pipe")))
    assert cli.main(command("nll", folder, tmp_path / "nll.json")) == 0
    assert json.loads((tmp_path / "nll.json").read_text())["bits_per_dim"]
    assert cli.main(command("sample", folder, tmp_path / "samples")) == 0
    assert (tmp_path / "samples" / "grid.png").exists()
    assert "error" not in capsys.readouterr().err


def test_a_full_disk_behind_the_output_is_said_at_the_end(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Gone(OSError(28, "No space left on device")))
    assert cli.main(command("nll", folder, tmp_path / "nll.json")) == 2
    assert (tmp_path / "nll.json").exists()
    message = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message == [
        "fastdiff: error: standard output could not be written (No space left on device)"
    ]


def test_closed_streams(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(command("nll", folder, tmp_path / "nll.json")) == 0
    assert (tmp_path / "nll.json").exists()


@pytest.mark.seconds
def test_real_pipes_and_locales(folder, tmp_path):
    """The example: latin-1 has ± but not …; and a reader that takes one line and leaves."""
    words = [sys.executable, "-m", "fastdiff", *command("nll", folder, tmp_path / "nll.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        words, env={**environment, "PYTHONIOENCODING": "latin-1"}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert "±".encode("latin-1") in done.stdout and b"..." in done.stdout
    (tmp_path / "nll.json").unlink()
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=-1)
    process.stdout.close()  # type: ignore[union-attr]
    assert b"Error" not in process.stderr.read()  # type: ignore[union-attr]
    assert process.wait() == 0
    assert (tmp_path / "nll.json").exists()


# Where reports go


@pytest.mark.seconds
@pytest.mark.parametrize("name", ["nll", "evaluate"])
def test_a_report_replaces_a_report_and_nothing_else(folder, tmp_path, capsys, name):
    other = {"nll": "evaluate", "evaluate": "nll"}[name]
    assert cli.main(command(other, folder, tmp_path / "other.json")) == 0
    (tmp_path / "thesis.tex").write_text("ten years of work")
    (tmp_path / "config.json").write_text((folder / "ckpt" / "config.json").read_text())
    (tmp_path / "list.json").write_text("[1]")
    for file in sorted(tmp_path.iterdir()):
        before = file.read_bytes()
        capsys.readouterr()
        assert cli.main(command(name, folder, file)) == 2
        message = capsys.readouterr().err
        assert f"--out {file} is there already and no report" in message
        assert message.count("\n") == 1 and file.read_bytes() == before
    mine = tmp_path / "mine.json"
    mine.touch()  # an empty file is nobody's loss
    assert cli.main(command(name, folder, mine)) == 0
    assert cli.main(command(name, folder, mine)) == 0
    assert sorted(p.name for p in tmp_path.glob(".*")) == []


def test_a_report_into_a_device(folder):
    assert cli.main(command("nll", folder, Path(os.devnull))) == 0
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize("name", ["grid.png", "png/sample_000005.png", "samples_22x8x8x1.npz"])
def test_samples_replace_no_file_of_others(folder, tmp_path, capsys, name):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_bytes(b"mine")
    assert cli.main(command("sample", folder, out)) == 2
    assert f"holds {name}, which fastdiff sample did not write" in capsys.readouterr().err
    assert [p for p in out.rglob("*") if p.is_file()] == [out / name]
    assert (out / name).read_bytes() == b"mine"
    (out / name).rename(out / "moved.png")
    assert cli.main(command("sample", folder, out)) == 0
    (out / "samples_22x8x8x1.npz").unlink()  # as its message says; the pictures speak for us
    assert cli.main(command("sample", folder, out)) == 0


# One of several processes


@pytest.mark.parametrize("name", sorted(set(cli.COMMANDS) - {"info"}))  # none knows of the others
@pytest.mark.parametrize("rank", [{}, {"RANK": "0"}, {"RANK": "1"}, {"SLURM_PROCID": "3"}])
def test_several_processes_are_refused(tmp_path, monkeypatch, capsys, name, rank):
    monkeypatch.chdir(tmp_path)
    for key, value in {"WORLD_SIZE": "2", **rank}.items():
        monkeypatch.setenv(key, value)
    needed = {
        "train": ["--data", "digits", "--out", "run"],
        "sample": ["--checkpoint", "c", "--out", "samples"],
        "compare": ["--checkpoint", "c", "--out", "compare"],
        "timesteps": ["--checkpoint", "c", "--steps", "5", "--out", "t.json"],
        "interpolate": ["--checkpoint", "c", "--between", "a.png", "b.png", "--out", "i"],
        "nll": ["--checkpoint", "c", "--data", "digits"],
        "rate-distortion": ["--checkpoint", "c", "--data", "digits", "--out", "rd"],
        "evaluate": ["--samples", "s.npz", "--data", "digits"],
        "reproduce": ["ddpm-cifar10", "--data", "digits", "--out", "run"],
        "convert": ["--model", "m.pt", "--out", "run"],
        "average": ["--run", "r", "--sigma-rel", "0.1", "--out", "run"],
        "bench": [],
    }
    if set(rank.values()) - {"0"}:
        with pytest.raises(SystemExit) as stop:
            cli.main([name, *needed[name]])
        assert stop.value.code == 2 and capsys.readouterr().err == ""
    else:
        assert cli.main([name, *needed[name]]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "started as 2 processes (WORLD_SIZE)" in message
        assert all(share in message for share in set(cli.SHARING) - {"info"})
    assert not list(tmp_path.iterdir())


def test_one_process_of_torchrun_and_info(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "1")
    ranks.refuse_several()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.main(["info"]) == 0
    monkeypatch.setenv("WORLD_SIZE", "four")
    assert cli.main(["nll", "--checkpoint", "c", "--data", "digits"]) == 2
    assert "WORLD_SIZE is 'four', expected a number" in capsys.readouterr().err


@pytest.mark.seconds
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_help_that_could_not_be_written_is_no_success():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "fastdiff", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "standard output could not be written" in done.stderr


def test_a_run_whose_name_is_no_text(tmp_path):
    (folder := tmp_path / os.fsdecode(b"q\xff")).mkdir()
    with pytest.raises(InputError, match="TensorBoard cannot write .* --no-tensorboard"):
        TensorBoard(folder, 0)

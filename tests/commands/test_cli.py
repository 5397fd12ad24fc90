"""The command line's own promises: bad input is one line and exit code 2, never a traceback."""

import subprocess
import sys

import pytest

from fastdiff import cli
from patience import WAIT


def run_command(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fastdiff", *args], capture_output=True, text=True, timeout=WAIT
    )


def test_every_subcommand_has_help(capsys):
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
        assert "usage: fastdiff " + name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["sample", "--checkpoint", "nowhere", "--out", "x"], "nowhere"),
        (["train", "--data", "nowhere", "--out", "x"], "nowhere"),
        (["train", "--data", "digits", "--out", "x", "--preset", "resnet"], "resnet"),
        (["evaluate", "--samples", "nowhere.npz", "--data", "digits"], "nowhere.npz"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith(f"fastdiff {args[0]}: error: ")
    assert words in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == [], "bad input must leave nothing behind"


@pytest.mark.seconds
def test_a_process_exits_with_2_and_no_traceback():
    result = run_command("nll", "--checkpoint", "nowhere", "--data", "digits")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.seconds
def test_unknown_command_and_flag_exit_with_2():
    assert run_command("draw").returncode == 2
    assert run_command("info", "--nonsense").returncode == 2


def test_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdiff.commands.info.run", interrupted)
    assert cli.main(["info"]) == 130
    assert "interrupted" in capsys.readouterr().err

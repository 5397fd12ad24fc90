"""The README is true: its example runs, its files exist, its commands know their flags."""

import re
import shlex
from pathlib import Path

import torch

from fastdiff.cli import build_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language ("" for those that name none)."""
    fenced = README.split("```")[1::2]
    return [text for first, _, text in (b.partition("\n") for b in fenced) if first == language]


def run(example: str) -> dict:
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    return names


def test_the_examples_run_as_printed():
    ten_lines, sampler, function, fused = (run(example) for example in blocks("python"))
    assert ten_lines["images"].shape == ten_lines["x"].shape
    assert torch.isfinite(ten_lines["images"]).all()
    filled, known = sampler["filled"], sampler["photo"][..., :4]
    assert torch.equal(filled[..., :4], known) and sampler["step"]["step"] == 7
    assert function["images"].shape == (4, 3, 32, 32)
    torch.testing.assert_close(fused["y"], fused["plain"])


def test_the_commands_parse():
    words = [shlex.split(line) for block in blocks("") for line in block.splitlines()]
    commands = [line for line in words if line[:1] in (["fastdiff"], ["torchrun"])]
    assert len(commands) >= 4
    for command in commands:
        build_parser().parse_args(command[command.index("fastdiff") + 1 :])


def test_every_file_it_names_exists():
    linked = re.findall(r"\]\(([^)#:]+)\)", README)
    table = re.findall(r"^\| (`.*?) \|", README, flags=re.MULTILINE)
    assert linked and len(table) >= 8
    for path in linked:
        assert (ROOT / path).exists(), path
    for row in table:
        folder = Path()
        for name in re.findall(r"`([^`]+)`", row):
            # "fastdiff/a.py, b.py": the later names stand beside the first.
            folder = Path(name).parent if name.startswith(("fastdiff/", "csrc")) else folder
            candidates = (ROOT / name, ROOT / folder / name)
            assert any(path.exists() for path in candidates), name

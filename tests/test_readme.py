"""The README is true: its example runs, its files exist, its commands know their flags."""

import re
from pathlib import Path

import pytest
import torch

from page_tools import ROOT, blocks, parse_commands, run

README = (ROOT / "README.md").read_text()


@pytest.mark.seconds
def test_the_examples_run_as_printed():
    ten_lines, sampler, function, fused = (
        run("README.md", example) for example in blocks("README.md", "python")
    )
    assert ten_lines["images"].shape == ten_lines["x"].shape
    assert torch.isfinite(ten_lines["images"]).all()
    filled, known = sampler["filled"], sampler["photo"][..., :4]
    assert torch.equal(filled[..., :4], known) and sampler["step"]["step"] == 7
    assert function["images"].shape == (4, 3, 32, 32)
    torch.testing.assert_close(fused["y"], fused["plain"])


def test_the_commands_parse():
    assert parse_commands("README.md") >= 4


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

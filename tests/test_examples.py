"""The studies run, print finite figures and save a picture."""

import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paths import ROOT

EXAMPLES = ROOT / "examples"
# The tables each prints, as (a piece of the title, columns, at least so many rows).
TABLES = {
    "one_dimensional": [("What the distances are worth", 3, 2), ("Wasserstein-1", 7, 5)],
    "linear_vs_cosine": [("Bits of the", 3, 11), ("Bound on the NLL", 6, 2), ("Fréchet", 3, 2)],
    "prediction_types": [("Squared distance", 5, 11), ("Sliced Wasserstein-1", 5, 5)],
    "vp_vs_ve": [
        ("What the distances are worth", 3, 2),
        ("DDPM (ancestral): sliced Wasserstein-1", 7, 5),
        ("DDPM (ancestral): KL", 7, 5),
        ("DDIM: sliced Wasserstein-1", 7, 5),
        ("DDIM: KL", 7, 5),
    ],
    "parameter_tying": [("sliced Wasserstein-1", 7, 9), ("The same distance", 2, 2)],
    "learned_variance": [
        ("Trained with T = 100: bound", 7, 2),
        ("Trained with T = 1000: bound", 7, 2),
        ("two halves of the real ones", 4, 2),
    ],
    "classifier_guidance": [("DDPM (algorithm 1)", 5, 2), ("DDIM (algorithm 2)", 5, 2)],
    "heavy_tails": [
        ("best reverse steps", 4, 2),
        ("samples of those chains", 7, 2),
        ("Ratio: the gradient", 5, 3),
    ],
    "langevin": [
        ("score against the exact one", 4, 6),
        ("By the network's score: sliced Wasserstein-1", 7, 2),
        ("By the network's score: share", 7, 2),
        ("By the exact score: sliced Wasserstein-1", 7, 2),
        ("By the exact score: share", 7, 2),
    ],
    "learned_posterior": [("two real sets", 8, 10)],
    "analytic_averaging": [
        ("By the draw alone", 7, 6),
        ("by every term", 4, 6),
        ("before its training", 4, 4),
        ("than with the closed form", 4, 6),
    ],
    "learned_schedule": [("multiple of the learned", 6, 5), ("bits/dim", 2, 5)],
    "ddim_vs_ddpm": [("Fréchet", 5, 2), ("over DDIM's", 4, 2)],
    "solver_convergence": [
        ("end of the probability-flow ODE", 9, 16),
        ("sliced Wasserstein-1", 7, 5),
    ],
    "tying_on_images": [("samples to real digits", 8, 3)],
}


def test_every_script_is_listed():
    scripts = {path.stem for path in EXAMPLES.glob("[!_]*.py")}
    assert scripts == set(TABLES)
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.py`" in readme for name in scripts)


@pytest.mark.parametrize("name", TABLES)
def test_it_loads_and_says_what_it_takes(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0 and "--quick" in capsys.readouterr().out


@pytest.mark.seconds
@pytest.mark.sample(2)
@pytest.mark.parametrize("command", [*TABLES, "linear_vs_cosine --data mnist5k"])
def test_quick_run(command, tmp_path):
    name, *options = command.split()
    out = tmp_path / "plots"
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--quick", "--out", str(out), *options],
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    assert result.returncode == 0, result.stderr
    assert not re.search(r"\b(nan|inf)\b", result.stdout, re.IGNORECASE), result.stdout
    found = tables(result.stdout)
    assert len(found) == len(TABLES[name]), result.stdout
    for (title, columns, rows), (line, cells) in zip(TABLES[name], found, strict=True):
        assert title in line
        assert len(cells) >= rows
        for row in cells:
            assert len(row) == columns
            assert all(math.isfinite(float(cell)) for cell in row[1:]), row
    check_picture(out / "plot.png")
    assert list(tmp_path.iterdir()) == [out]  # nothing is written elsewhere


def tables(text: str) -> list[tuple[str, list[list[str]]]]:
    """(the line above the header, rows of cells) of every table: below a rule of dashes."""
    lines = text.splitlines()
    found = []
    for i, line in enumerate(lines):
        if not re.fullmatch(r"-[- ]*", line):
            continue
        spans = [match.span() for match in re.finditer("-+", line)]
        body = []
        for row in lines[i + 1 :]:
            if not row or "±" in row:
                break
            body.append([row[start:end].strip() for start, end in spans])
        found.append((lines[i - 2], body))
    return found


def check_picture(path: Path) -> None:
    """A PNG that decodes whole, and on which something is drawn."""
    image = pytest.importorskip("PIL.Image").open(path)
    assert image.format == "PNG"
    pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) >= 300
    drawn = (pixels < 250).any(-1)
    assert 0.02 < drawn.mean() < 0.9

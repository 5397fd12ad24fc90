"""The README is true: its examples run, its files exist, its commands know their flags."""

import re

import pytest
import torch

import fastdiff
from page_tools import ROOT, blocks, parse_commands, run, save_pipeline, smaller

README = (ROOT / "README.md").read_text()


@pytest.mark.seconds
def test_the_first_example_runs_as_printed():
    ten_lines, _, _ = blocks("README.md", "python")
    done = run("README.md", ten_lines)
    assert done["images"].shape == done["x"].shape
    assert torch.isfinite(done["images"]).all()


@pytest.mark.seconds
def test_the_ten_lines_with_a_network_and_data_of_ones_own(tmp_path, monkeypatch):
    _, example, _ = blocks("README.md", "python")
    lines = [line for line in example.splitlines() if line and "import " not in line]
    assert len(lines) == 10
    monkeypatch.chdir(tmp_path)
    done = run("README.md", smaller(example, batch_size=4, steps=3))
    (loading,) = re.findall(r"`(fastdiff\.load\(.*?\))` loads it", README)
    checkpoint = eval(loading, done)
    assert checkpoint.step == 3
    images = fastdiff.Sampler(checkpoint.model, checkpoint.diffusion, steps=2).sample((2, 3, 8, 8))
    assert torch.isfinite(images).all()


@pytest.mark.seconds
def test_the_drop_in_example_runs_as_printed_but_for_sizes(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    save_pipeline(tmp_path / "path/to/ddpm-cifar10")
    monkeypatch.chdir(tmp_path)
    *_, example = blocks("README.md", "python")
    example = smaller(example, batch_size="2, output_type='np'", num_inference_steps=10)
    stock = re.sub(r"accelerate_pipeline\((.*)\)$", r"\1", example, flags=re.MULTILINE)
    assert stock != example
    images, expected = (torch.as_tensor(run("README.md", e)["images"]) for e in (example, stock))
    assert images.shape == (2, 32, 32, 3)
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=0)


def test_the_commands_parse():
    written = re.findall(r"^(?:fastdiff|torchrun) ", README, flags=re.MULTILINE)
    assert parse_commands("README.md") == len(written) >= 2


def test_what_make_is_asked_for_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([\w-]+)\b(?=[` ])", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^(?:[\w-]+ )*{target}\b[^:=\n]*:", makefile, flags=re.MULTILINE), target


def test_every_file_it_names_exists():
    linked = re.findall(r"\]\(([^)#:]+)\)", README)
    table = re.findall(r"^\| (`.*?) \|", README, flags=re.MULTILINE)
    assert linked and len(table) >= 8
    for path in linked:
        assert (ROOT / path).exists(), path
    for row in table:
        for name in re.findall(r"`([^`]+)`", row):
            assert (ROOT / name).is_dir(), name


def test_every_folder_of_the_package_stands_in_the_table():
    folders = {p.parent.name for p in (ROOT / "fastdiff").glob("*/__init__.py")}
    assert {name for name in folders if f"`fastdiff/{name}/`" not in README} == set()


def test_its_measurements_are_those_of_the_benchmarks():
    page = (ROOT / "docs/benchmarks.md").read_text()
    figures = re.findall(r"^\| \*\*([\d.]+)×\*\*", README, flags=re.MULTILINE)
    assert len(figures) == 3
    for figure in figures:
        assert re.search(rf"\| {re.escape(figure)}×? \|", page), figure

"""``fastdiff reproduce``: every experiment through all its stages, begun again where it stopped."""

import csv
import json
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fastdiff.cli import main
from fastdiff.commands import reproduce
from fastdiff.evaluation.features import NETWORKS
from fastdiff.experiments import rates
from fastdiff.experiments.plan import planned_seconds
from fastdiff.experiments.table import EXPERIMENTS, Experiment, OverSteps
from fastdiff.models import presets

SMALL = ("--features", "efficientnet-lite0", "--device", "cpu", "--scale", "1e-12")
TABLES = [name for name, found in EXPERIMENTS.items() if isinstance(found, Experiment)]


def command(name, data, out, *flags):
    words = ["reproduce", name, "--data", data, "--out", out, *SMALL, *flags]
    return main([str(word) for word in words])


def side_of(experiment):
    return presets.get(experiment.preset).model["image_size"]


@pytest.mark.long
@pytest.mark.parametrize("name", TABLES)
def test_every_experiment_through_all_its_stages(name, images, tmp_path, capsys, hasty):
    experiment = EXPERIMENTS[name]
    assert command(name, images(side_of(experiment)), tmp_path / "out") == 0
    check_report(experiment, tmp_path / "out", capsys.readouterr().out)


def check_report(experiment, out, printed):
    report = json.loads((out / "report.json").read_text())
    found = {(row["sampling"], row["score"]): row for row in report["results"]}
    for sampling in experiment.samplings:
        for score, figure in sampling.figures.items():
            title = {"fid": "FID", "inception_score": "Inception score"}.get(score, score)
            assert found[sampling.name, title]["paper"] == figure
            assert f"{figure:g}" in printed
    if experiment.bits_per_dim is not None:
        assert found["", "bits/dim"]["paper"] == experiment.bits_per_dim
        bits = json.loads((out / "nll.json").read_text())["bits_per_dim"]["total"]
        assert found["", "bits/dim"]["here"] == bits > 0
    differs = "\n".join(report["differs"])
    assert "is not the network of the papers" in differs and "8 samples of 50,000" in differs


@pytest.mark.seconds
def test_killed_between_stages_it_goes_on_with_the_next(
    images, tmp_path, capsys, small, monkeypatch
):
    data, out, do, stages = images(8), tmp_path / "out", reproduce._do, []

    def interrupted(stage):
        if stage.name == "nll":
            raise KeyboardInterrupt
        stages.append(stage.name)
        do(stage)

    monkeypatch.setattr(reproduce, "_do", interrupted)
    assert command("ddpm-cifar10", data, out) == 130
    assert stages == ["train", "1000-steps/sample", "1000-steps/evaluate"]

    stages.clear()
    monkeypatch.setattr(reproduce, "_do", lambda stage: stages.append(stage.name) or do(stage))
    capsys.readouterr()
    assert command("ddpm-cifar10", data, out) == 0
    assert stages == ["nll"]
    printed = capsys.readouterr().out
    assert printed.count("  done\n") == 3 and "bits/dim of 8 of 10 images" in printed
    check_report(EXPERIMENTS["ddpm-cifar10"], out, printed)

    assert command("ddpm-cifar10", data, out) == 0 and stages == ["nll"]
    capsys.readouterr()
    assert command("ddpm-cifar10", data, out, "--sample-flags=--dtype bfloat16") == 2
    assert "was begun with sample_flags '', and now it is '--dtype" in capsys.readouterr().err
    assert command("iddpm-cifar10-vlb", data, out) == 2
    assert "was begun with name 'ddpm-cifar10'" in capsys.readouterr().err


@pytest.mark.long
def test_by_two_processes(images, tmp_path, start):
    out = tmp_path / "out"
    words = ["reproduce", "ddpm-cifar10", "--data", images(32), "--out", out, *SMALL]
    codes, log = start(2, [str(word) for word in words]).finish()
    assert codes == [0, 0], log
    assert log.count("== nll: ") == 1
    check_report(EXPERIMENTS["ddpm-cifar10"], out, log)


@pytest.mark.long
def test_figure_10(images, tmp_path, capsys, hasty):
    assert command("figure-10", images(64, classes=False), tmp_path / "out") == 0
    rows = read_rows(tmp_path / "out" / "figure-10.csv")
    assert [row["curve"] for row in rows] == [
        preset for preset in EXPERIMENTS["figure-10"].presets for _ in range(2)
    ]
    assert float(rows[1]["flops"]) == 2 * float(rows[0]["flops"]) > 1e9
    assert all(float(row["fid"]) > 0 and float(row["bits_per_dim"]) > 0 for row in rows)
    check_picture(tmp_path / "out" / "figure-10.png")


@pytest.mark.seconds
def test_figure_8(images, network, tmp_path, capsys, small, monkeypatch):
    curves = EXPERIMENTS["figure-8"].curves
    less = OverSteps("figure-8", "source", "data", steps=(2, 30), samples=8, curves=curves)
    monkeypatch.setitem(EXPERIMENTS, "figure-8", less)
    pair = ("--learned", network("learned", True), "--fixed", network("fixed", False))
    data, out = images(8, classes=False), tmp_path / "out"
    assert command("figure-8", data, out, *pair, "--scale", "1") == 0
    rows = read_rows(out / "figure-8.csv")
    assert [row["curve"] for row in rows] == [curve for curve in curves for _ in range(2)]
    assert [float(row["steps"]) for row in rows] == 4 * [2, 30]
    check_picture(out / "figure-8.png")
    of_steps = {row["fid"] for row in rows}
    assert len(of_steps) == 8  # each is another sampler's


def read_rows(path):
    with path.open() as stream:
        return list(csv.DictReader(stream))


def check_picture(path):
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 400
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20  # something is drawn


@pytest.mark.seconds
def test_a_plan_alone_does_nothing(images, tmp_path, capsys, small):
    out = tmp_path / "out"
    assert command("iddpm-cifar10-hybrid", images(8), out, "--plan", "--machines", "6") == 0
    assert not out.exists()
    header, *rows = capsys.readouterr().out.split("\nstage")[1].splitlines()
    assert header.split() == "TFLOP TFLOP/s disk on 1 on 2 on 4 on 6".split()
    assert [row.split()[0] for row in rows[:5]] == [
        "train", "4000-steps/sample", "4000-steps/evaluate", "nll", "left",
    ]  # fmt: skip


@pytest.mark.long
def test_the_plan_is_within_twice_what_is_then_taken(images, tmp_path, monkeypatch):
    """In this process' own time, which others on the machine take little from."""
    monkeypatch.setattr(rates, "time", SimpleNamespace(perf_counter=time.process_time))
    planned, taken = {}, {}
    plan_text, do = reproduce.plan_text, reproduce._do

    def planning(stages, done, found, **options):
        for stage in stages:
            planned[stage.name] = planned_seconds([stage], found)
        return plan_text(stages, done, found, **options)

    def timed(stage):
        begun = time.process_time()
        do(stage)
        taken[stage.name] = time.process_time() - begun

    monkeypatch.setattr(reproduce, "plan_text", planning)
    monkeypatch.setattr(reproduce, "_do", timed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # 20 iterations, 71 steps.
        data, out = images(32), tmp_path / "out"
        assert command("ddpm-cifar10", data, out, "--scale", "2.5e-5") == 0
    finally:
        torch.set_num_threads(threads)
    assert planned.keys() == taken.keys()
    assert 0.5 < sum(planned.values()) / sum(taken.values()) < 2, (planned, taken)


@pytest.mark.seconds
def test_a_checkpoint_in_place_of_a_training(images, network, tmp_path, capsys, small):
    data, given = images(8, classes=False), network("given", True)
    assert command("iddpm-cifar10-hybrid", data, tmp_path / "out", "--checkpoint", given) == 0
    printed = capsys.readouterr().out
    assert "== train" not in printed and f"is given, {given}" in printed

    for changes, message in [
        ({"learned": False}, "var_type is 'fixed_large', expected 'learned_range'"),
        ({"learned": True, "num_res_blocks": 2}, "num_res_blocks is 2, expected 1"),
        ({"learned": True, "num_classes": 3}, "has 3 classes, the data none"),
    ]:
        other = network("other", **changes)
        assert command("iddpm-cifar10-hybrid", data, tmp_path / "no", "--checkpoint", other) == 2
        assert message in capsys.readouterr().err


def test_features_that_a_metric_lacks_are_missed_first(
    images, tmp_path, capsys, monkeypatch, small
):
    monkeypatch.setattr(NETWORKS["efficientnet-lite0"], "widths", {"pooled": 48})
    out = tmp_path / "out"
    assert command("ddpm-cifar10", images(8, classes=False), out) == 2
    assert "metric 'is' needs logits features, which means has not" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.seconds
def test_bad_input(images, network, tmp_path, capsys):
    data, cifar = images(8, classes=False), images(32)
    learned, fixed = network("learned", True), network("fixed", False)
    pair = ("--learned", learned, "--fixed", fixed)
    cases = [
        ("ddpm", data, (), "no experiment named 'ddpm'; there are ddpm-cifar10, "),
        ("ddpm-cifar10", data, (), "(C, H, W) (3, 8, 8), ddpm-cifar10 those of (3, 32, 32)"),
        ("ddpm-cifar10", images(32, 1), (), "(1, 32, 32), ddpm-cifar10 those of (3, 32, 32)"),
        ("ddpm-cifar10", cifar, ("--image-size", 64), "--image-size is 64; the images of ddpm"),
        ("iddpm-imagenet64-cond", images(64, classes=False), (), "has no labels"),
        ("ddpm-cifar10", cifar, ("--scale", 0), "--scale is 0; expected more than 0 and at most 1"),
        ("ddpm-cifar10", cifar, ("--scale", 1.5), "--scale is 1.5; expected more than 0 and at"),
        ("ddpm-cifar10", cifar, ("--machines", 0), "--machines is 0; expected 1 or more"),
        ("ddpm-cifar10", cifar, ("--train-flags=--sharp",), "unrecognized arguments: --sharp"),
        (
            "ddpm-cifar10", cifar, ("--checkpoint", learned, "--train-flags=--flip"),
            "--train-flags: nothing is trained",
        ),
        ("ddpm-lsun-cat", data, ("--eval-data", data), "ddpm-lsun-cat measures no bits/dim"),
        ("ddpm-cifar10", cifar, ("--checkpoint", learned), "makes images of (C, H, W) (3, 8, 8)"),
        ("ddpm-cifar10", cifar, pair, "--learned: ddpm-cifar10 takes --checkpoint"),
        ("ddpm-cifar10", cifar, ("--features", "inception"), "needs its weights"),
        ("figure-8", data, ("--learned", learned), "figure-8 compares two checkpoints"),
        ("figure-8", cifar, pair, "(3, 32, 32), figure-8 those of (3, 8, 8)"),
        (
            "figure-8", data, ("--learned", fixed, "--fixed", fixed),
            "--learned has the variance fixed_large",
        ),
        ("figure-10", images(64), ("--checkpoint", learned), "figure-10 takes no checkpoint"),
    ]  # fmt: skip
    for name, spec, flags, message in cases:
        assert command(name, spec, tmp_path / "out", *flags) == 2, message
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("fastdiff reproduce: error: ") and message in line
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    assert command("ddpm-cifar10", cifar, tmp_path / "out") == 2
    assert "is not empty" in capsys.readouterr().err

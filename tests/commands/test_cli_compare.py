"""fastdiff compare: outcomes of a small network, and what it says of arguments that do not fit."""

import json

import pytest
import torch

from fastdiff.cli import main
from fastdiff.experiments.comparison import (
    Case,
    Comparison,
    Outcome,
    best,
    every_outcome,
    markdown,
)
from fastdiff.methods.registry import METHODS
from fastdiff.process.gaussian import GaussianDiffusion, create_diffusion
from fastdiff.sampling.sampler import Sampler
from parts_tools import save_network


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp("network"), 0)


def compare(checkpoint, out, *flags):
    base = ["compare", "--checkpoint", str(checkpoint), "--out", str(out)]
    return main([*base, "--calls", "2,6", "--paths", "3", "--batch-size", "2", *flags])


def test_a_table_a_picture_and_a_record_that_is_gone_on_with(checkpoint, tmp_path, capsys):
    methods = ["--methods", "ddim,dpmsolver++,ddpm", "--spacings", "uniform,logsnr"]
    given = [*methods, "--data", "digits", "--num", "5"]
    assert compare(checkpoint, tmp_path, *given) == 0
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"
    table, every = (tmp_path / "compare.md").read_text().split("Error / Fréchet ratio of all")
    assert table in capsys.readouterr().out
    assert every.count("| `ddim` | `logsnr` |") == 1 and every.count("| `ddpm` |") == 2
    assert "| `ddim` |" in table and "| `ddpm` |" in table.split("Fréchet")[1]
    assert "`ddpm`" not in table.split("Fréchet")[0]  # it draws noise: it has no error
    record = json.loads((tmp_path / "compare.json").read_text())
    assert len(record["outcomes"]) == 12
    record["outcomes"][0]["frechet"] = 123.0
    (tmp_path / "compare.json").write_text(json.dumps(record))
    assert compare(checkpoint, tmp_path, *given) == 0  # finds all of them, and draws nothing
    assert json.loads((tmp_path / "compare.json").read_text()) == record
    given[1] = "dpmsolver++,ddim"
    assert compare(checkpoint, tmp_path, *given) == 0  # shows these alone, in this order
    errors = (tmp_path / "compare.md").read_text().split("Fréchet")[0]
    assert 0 < errors.index("| `dpmsolver++` |") < errors.index("| `ddim` |")
    assert main(["compare", "--checkpoint", str(checkpoint), "--out", str(tmp_path)]) == 2
    assert "is of data 'digits', and now it is None" in capsys.readouterr().err


def test_errors_alone_without_data(checkpoint, tmp_path):
    assert compare(checkpoint, tmp_path, "--methods", "ddim,ddpm", "--spacings", "uniform") == 0
    outcomes = json.loads((tmp_path / "compare.json").read_text())["outcomes"]
    by_case = {(o["method"], o["calls"]): o for o in outcomes}
    assert by_case["ddpm", 6]["error"] is None and by_case["ddpm", 6]["frechet"] is None
    assert 0 < by_case["ddim", 6]["error"] < by_case["ddim", 2]["error"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--methods", "ddim,eulr"], "--methods has 'eulr'; expected of "),
        (["--spacings", "even"], "--spacings has 'even'; expected of "),
        (["--methods", ","], "--methods is empty"),
        (["--calls", "5,x"], "--calls is '5,x'; expected numbers of network calls"),
        (["--calls", "0"], "--calls is '0'"),
        (["--num", "1"], "--num is 1; expected 2 or more"),
        (["--methods", "ddpm"], "no case had a score: give --data, or methods that draw no noise"),
    ],
)
def test_what_does_not_fit(checkpoint, tmp_path, capsys, flags, message):
    assert compare(checkpoint, tmp_path, *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_a_case_takes_no_more_calls_than_it_says(method):
    calls = []

    def network(x, t):
        calls.append(len(x))
        return 0.1 * x

    sampler = Sampler(network, create_diffusion(steps=30, noise_schedule="cosine"), device="cpu")
    drawn = {"num": 4, "paths": 3, "batch_size": 4, "seed": 0}
    comparison = Comparison(
        sampler, (1, 2, 2), **drawn, kwargs=lambda first, count: {}, frechet=lambda images: 1.5
    )
    comparison.solution()
    for count in (1, 2, 7, 20):
        calls.clear()
        outcome = comparison.outcome(Case(method, "uniform", count))
        assert len(calls) <= count
        if outcome is None:  # a single step takes more calls, or begins with mostly data
            assert not calls and count < 20
            continue
        assert 1 <= outcome.steps <= len(calls) and outcome.frechet == 1.5
        assert (outcome.error is None) == sampler.table.is_noisy


def test_what_a_network_cannot_is_left_out():
    betas = create_diffusion(steps=20, noise_schedule="cosine").betas
    process = GaussianDiffusion(betas, mean_type="previous_x")
    sampler = Sampler(lambda x, t: 0.9 * x, process, device="cpu")
    drawn = {"num": 2, "paths": 2, "batch_size": 2, "seed": 0}
    comparison = Comparison(sampler, (2, 2), **drawn, kwargs=lambda first, count: {}, frechet=None)
    assert comparison.outcome(Case("ddim", "karras", 5)) is None
    assert comparison.outcome(Case("ddim", "uniform", 5)).steps == 5


def test_the_error_is_the_distance_from_all_steps():
    def network(x, t):
        return torch.tanh(x)

    process = create_diffusion(steps=20, noise_schedule="cosine")
    sampler = Sampler(network, process, device="cpu")
    drawn = {"num": 4, "paths": 4, "batch_size": 3, "seed": 5}
    comparison = Comparison(sampler, (2, 3), **drawn, kwargs=lambda first, count: {}, frechet=None)
    found = comparison.outcome(Case("ddim", "uniform", 4))
    whole = Sampler(network, process, method="dpmsolver++", device="cpu").sample((4, 2, 3), seed=5)
    coarse = Sampler(network, process, steps=4, method="ddim", device="cpu")
    wanted = (coarse.sample((4, 2, 3), seed=5) - whole).square().mean().sqrt().item()
    assert found.error == pytest.approx(wanted, rel=1e-5)
    assert comparison.outcome(Case("dpmsolver++", "uniform", 20)).error < 1e-6


def test_the_best_of_each_method_and_spacing_is_shown():
    outcomes = [
        Outcome("a", "uniform", 5, 5, 0.2, 3.0),
        Outcome("a", "logsnr", 5, 5, 0.1, 4.0),
        Outcome("b", "uniform", 5, 5, None, 2.0),
        Outcome("b", "uniform", 10, 10, None, 1.25),
    ]
    assert best(outcomes, "error") == {("a", 5): outcomes[1]}
    assert best(outcomes, "frechet", "spacing")["uniform", 5] == outcomes[2]
    errors, spaced_errors, ratios, spaced_ratios = markdown(outcomes).strip().split("\n\n")[1::2]
    assert "| `a` | **0.1** logsnr | – |" in errors and "`b`" not in errors
    assert "| `uniform` | 0.2 a | – |" in spaced_errors
    assert "| `a` | 3 uniform | – |" in ratios and "| `b` | **2** uniform | **1.25**" in ratios
    assert "| `uniform` | **2** b | **1.25** b |" in spaced_ratios
    assert "| `logsnr` | 4 a | – |" in spaced_ratios
    rows = every_outcome(outcomes).splitlines()
    assert rows[2] == "| method | spacing | 5 | 10 |"
    assert "| `a` | `logsnr` | 0.1 / 4 | – / – |" in rows
    assert "| `b` | `uniform` | – / 2 | – / 1.25 |" in rows

"""What a sampler is told beside the method, where a step has several rows: a classifier, whose
gradient every row's x_0 takes, and another start."""

import pytest
import torch

from fastdiff.methods.registry import METHODS
from fastdiff.sampling.sampler import Sampler
from sampler_tools import SHAPE, closed_form, diffusion

KEPT = [name for name in METHODS if name != "ddpm"]  # whose mean a classifier moves, not x_0


@pytest.mark.parametrize("method", KEPT)
def test_a_classifier_moves_x_start_in_every_row(method):
    """Sampling with a gradient g is sampling with a network whose ε is ε − noise·g (Dhariwal &
    Nichol 2021, algorithm 2), whatever rows keep for later ones."""
    process, model = diffusion(30), closed_form()
    options = {"steps": 6, "method": method, "clip_denoised": False}
    plain = Sampler(model, process, **options)
    noise = dict(zip(plain.table.timesteps.tolist(), plain.table.levels[:, 1], strict=True))

    def gradient(x, t):
        return 0.5 * torch.sin(2 * x + 0.1 * t.view(-1, 1, 1, 1))

    def guided(x, t):
        return model(x, t) - noise[float(t[0])] * gradient(x, t)

    seen = Sampler(model, process, cond_fn=gradient, **options).sample(SHAPE, seed=3)
    expected = Sampler(guided, process, **options).sample(SHAPE, seed=3)
    scale = float(expected.abs().max())
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4 * scale)
    assert (seen - plain.sample(SHAPE, seed=3)).abs().max() > 0.01


@pytest.mark.parametrize("method", ["heun", "dpmsolver++3s", "predictor-corrector", "restart"])
def test_iterating_yields_every_row(method):
    sampler = Sampler(closed_form(), diffusion(40), steps=7, method=method)
    rows = list(sampler.iterate(SHAPE, seed=1))
    assert [row["step"] for row in rows] == list(range(len(sampler.table)))
    assert torch.equal(rows[-1]["sample"], sampler.sample(SHAPE, seed=1))
    assert sampler.stats.steps == len(rows)


def test_a_late_start_leaves_out_the_restarts_above_it():
    process = diffusion(100, "linear")
    given = {"method_options": {"restarts": [(0.05, 2.0, 3, 1)]}, "steps": 10}
    sampler = Sampler(closed_form(), process, method="restart", **given)
    heun = Sampler(closed_form(), process, method="heun", steps=10)
    assert len(sampler.table) == len(heun.table) + 4
    image = torch.randn(SHAPE).clamp(-1, 1)
    late = {"image": image, "strength": 0.3, "seed": 2}
    assert torch.equal(sampler.sample(SHAPE, **late), heun.sample(SHAPE, **late))
    early = {"image": image, "strength": 0.9, "seed": 2}
    assert not torch.equal(sampler.sample(SHAPE, **early), heun.sample(SHAPE, **early))

"""Offset and immiscible noise: whose numbers they are, and that steps are taken with them."""

import sys

import numpy as np
import pytest
import torch

from fastdiff.data.words import OFFSET_NOISE, words
from fastdiff.errors import InputError
from fastdiff.ops.counters import training_step
from fastdiff.ops.normal import normal
from fastdiff.training import TrainConfig
from fastdiff.training.noise import Noise
from training_tools import make_trainer

X = torch.randn((6, 3, 4, 4), generator=torch.Generator().manual_seed(0))
X = X.contiguous(memory_format=torch.channels_last)


def drawn(x=X, step=5, first_sample=0, **settings):
    return Noise(TrainConfig(seed=3, **settings)).drawn(x, step, first_sample)


def test_plain_noise_is_left_to_the_losses():
    assert drawn() is None


def test_offset_noise_written_out():
    seed = int(words(3, 0, OFFSET_NOISE, 1)[0])
    shift = normal((6, 3), seed=seed, step=training_step(5))
    plain = normal(X.shape, seed=3, step=training_step(5))
    torch.testing.assert_close(drawn(offset_noise=0.1), plain + 0.1 * shift[:, :, None, None])
    assert not torch.equal(shift, plain.flatten(1)[:, :3])


def test_offset_noise_does_not_depend_on_who_draws_it():
    parts = [drawn(X[:2], offset_noise=0.1), drawn(X[2:], first_sample=2, offset_noise=0.1)]
    assert torch.equal(torch.cat(parts), drawn(offset_noise=0.1))
    assert not torch.equal(drawn(step=6, offset_noise=0.1), drawn(offset_noise=0.1))


@pytest.mark.parametrize("x", [X, X.flatten(2), X[:1]], ids=["pictures", "one axis", "alone"])
def test_immiscible_noise_is_the_same_noise_nearer(x):
    pytest.importorskip("scipy")
    plain, found = drawn(x, offset_noise=0.5), drawn(x, offset_noise=0.5, immiscible=True)
    order = [int((plain == one).flatten(1).all(1).nonzero()) for one in found]
    assert sorted(order) == list(range(len(x)))
    far, near = ((x - noise).flatten(1).norm(dim=1).sum() for noise in (plain, found))
    assert near < far or len(x) == 1


def test_immiscible_noise_is_the_best_of_all_orders():
    pytest.importorskip("scipy")
    from itertools import permutations

    plain, found = drawn(X[:4], offset_noise=0.5), drawn(X[:4], offset_noise=0.5, immiscible=True)
    sums = [
        float((X[:4] - plain[list(order)]).flatten(1).norm(dim=1).sum())
        for order in permutations(range(4))
    ]
    assert float((X[:4] - found).flatten(1).norm(dim=1).sum()) == pytest.approx(min(sums), rel=1e-3)


def test_without_scipy_one_line_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(InputError, match=r"scipy.*pip install 'fastdiff\[immiscible\]'"):
        drawn(immiscible=True)


@pytest.mark.seconds
def test_steps_are_taken_with_it(tmp_path):
    """The same in one pass or in several, and another than with plain noise."""
    pytest.importorskip("scipy")
    plain = {"label_dropout": 0.0, "model": {"dropout": 0.0}}
    noises = {"offset_noise": 0.3, "immiscible": True}
    gradients = []
    for name, settings in {"a": {}, "b": noises, "c": {**noises, "microbatch": 3}}.items():
        trainer = make_trainer(tmp_path / name, **plain, **settings)
        trainer._train_step()
        gradients.append(np.concatenate([p.grad.flatten() for p in trainer.parameters]))
    np.testing.assert_allclose(gradients[1], gradients[2], rtol=1e-4, atol=1e-6)
    assert np.abs(gradients[0] - gradients[1]).max() > 1e-3

"""Which rows run whole, and what is measured to choose them."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.errors import InputError
from fastdiff.sampling.feature_changes import adaptive_rows, feature_changes, measured_rows
from fastdiff.sampling.reuse import (
    WHOLE,
    Extent,
    Reuse,
    best_rows,
    extents,
    quadratic_rows,
    rows_within,
)
from fastdiff.sampling.sampler import Sampler
from sampler_tools import diffusion
from unet_tools import small_unet

SHAPE = (2, 3, 8, 8)
LABELS = {"y": torch.tensor([0, 2])}


def sampler_of(model, **options):
    return Sampler(model, diffusion(20), method="ddim", **options)


@given(
    guided=st.lists(st.booleans(), min_size=1, max_size=12),
    every=st.integers(1, 5),
    others=st.integers(1, 5),
)
@settings(deadline=None)
def test_what_a_row_runs(guided, every, others):
    found = extents(guided, every, others)
    for i, extent in enumerate(found):
        begins = i == 0 or guided[i] != guided[i - 1]
        assert extent.deep == (begins or i % every == 0)
        assert extent.both == (begins or i % others == 0 or not guided[i])
    assert extents(guided, None, None) == [WHOLE] * len(guided)
    by_list = extents(guided, list(range(0, len(guided), every)), None)
    assert [e.deep for e in by_list] == [e.deep for e in found]
    assert extents([True] * 4, (0, 5), None, skipped=3)[1:] == [
        Extent(deep=deep) for deep in (False, True, False)
    ]


def test_quadratic_rows_are_dense_around_their_centre():
    # u = −15^(1/1.4) … 35^(1/1.4)
    rows = quadratic_rows(50, 10, centre=15)
    exponent = 1 / 1.4
    u = np.linspace(-(15**exponent), 35**exponent, 11)[:-1]
    expected = np.floor(15 + np.sign(u) * np.abs(u) ** 1.4)
    assert rows == sorted({0, *expected.astype(int).tolist()})
    assert rows == [0, 5, 10, 13, 15, 19, 24, 29, 35, 42]
    # The published function's, where it takes no power of a negative number.
    assert quadratic_rows(50, 10, centre=0) == [0, 1, 5, 9, 13, 18, 24, 30, 36, 43]
    assert quadratic_rows(50, 10, centre=0, power=1.2) == [0, 3, 7, 11, 16, 21, 27, 32, 38, 44]
    gaps = np.diff(quadratic_rows(100, 20, centre=50, power=2))
    assert gaps[9] < gaps[0] and gaps[9] < gaps[-1]


@given(count=st.integers(1, 60), data=st.data())
@settings(deadline=None)
def test_quadratic_rows_are_as_many_as_are_asked_for(count, data):
    whole = data.draw(st.integers(1, count))
    centre = data.draw(st.floats(0, count))
    power = data.draw(st.floats(1, 3))
    rows = quadratic_rows(count, whole, centre=centre, power=power)
    assert rows[0] == 0 and rows == sorted(set(rows)) and rows[-1] < count
    assert len(rows) == whole


@given(count=st.integers(1, 7), data=st.data())
@settings(deadline=None)
def test_the_best_rows_are_the_best_of_all(count, data):
    whole = data.draw(st.integers(1, count))
    seed = data.draw(st.integers(0, 2**32 - 1))
    changes = np.random.default_rng(seed).random((count, count))

    def total(rows):
        kept = [max(r for r in rows if r <= i) for i in range(count)]
        return sum(changes[k, i] for i, k in enumerate(kept) if k != i)

    found = best_rows(changes, whole)
    others = itertools.combinations(range(1, count), whole - 1)
    least = min(total((0, *chosen)) for chosen in others)
    assert len(found) == whole and found[0] == 0 and found == sorted(found)
    assert total(found) == pytest.approx(least, abs=1e-12 * count)


def test_rows_measured_on_the_network():
    model = small_unet(num_classes=3, null_class=True)
    sampler = sampler_of(model, guidance_scale=2.0, steps=6)
    changes = feature_changes(sampler, SHAPE, depth=1, seed=1, model_kwargs=LABELS)
    assert changes.shape == (6, 6) and not np.diag(changes).any() and (changes >= 0).all()
    by_hand = Keeping(model)
    sampler_of(by_hand, guidance_scale=2.0, steps=6, executor=False).sample(
        SHAPE, seed=1, model_kwargs=LABELS, uncond_kwargs={"y": torch.tensor([3, 3])}
    )
    for i, j in itertools.product(range(6), repeat=2):
        kept, own = by_hand.deep[i].flatten(1), by_hand.deep[j].flatten(1)
        expected = ((own - kept).abs().sum(1) / own.abs().sum(1)).mean()
        assert changes[i, j] == pytest.approx(float(expected), abs=1e-4)
    rows = measured_rows(sampler, 3, SHAPE, depth=1, seed=1, model_kwargs=LABELS)
    assert rows == best_rows(changes, 3)
    threshold = float(np.median(changes[0, 1:]))
    rows = adaptive_rows(sampler, threshold, SHAPE, depth=1, seed=1, model_kwargs=LABELS)
    assert rows == rows_within(changes, threshold) and 1 < len(rows) < 6
    sampler.configure(reuse=Reuse(rows, 1)).sample(SHAPE, model_kwargs=LABELS)


def test_rows_are_measured_with_a_guide_that_runs_as_samples_have_it():
    options = {"guidance_scale": 2.0, "guide": small_unet(), "executor": True, "steps": 3}
    sampler = sampler_of(small_unet(), **options)
    assert feature_changes(sampler, SHAPE, depth=1).shape == (3, 3)
    how = "the network as a program of"
    assert all(network.programs.explain().startswith(how) for network in sampler._networks)
    assert not any(network.running for network in sampler._networks)


@given(count=st.integers(1, 7), threshold=st.floats(0, 1), data=st.data())
@settings(deadline=None)
def test_no_row_reuses_features_that_differ_by_more_than_the_threshold(count, threshold, data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    places = np.cumsum(np.random.default_rng(seed).random(count))
    changes = np.abs(places[:, None] - places)  # which grow with the distance
    rows = rows_within(changes, threshold)
    kept = [max(r for r in rows if r <= i) for i in range(count)]
    assert all(changes[k, i] <= threshold for i, k in enumerate(kept))
    fewer = (
        chosen
        for size in range(len(rows) - 1)
        for chosen in itertools.combinations(range(1, count), size)
    )
    for chosen in fewer:  # none of which is enough
        kept = [max(r for r in (0, *chosen) if r <= i) for i in range(count)]
        assert any(changes[k, i] > threshold for i, k in enumerate(kept))


class Keeping:
    """Keeps the deep values of the conditional half."""

    def __init__(self, model):
        self.model, self.deep = model, []

    def __call__(self, x, t, y=None):
        output, deep = self.model.forward_cut(x, t, y, depth=1)
        self.deep.append(deep[: len(x) // 2].double())
        return output


@pytest.mark.parametrize(
    "call",
    [
        lambda: quadratic_rows(10, 11, centre=5),
        lambda: quadratic_rows(10, 5, centre=11),
        lambda: quadratic_rows(10, 5, centre=5, power=0.5),
        lambda: quadratic_rows(10, 5, centre=5, power=float("inf")),
        lambda: best_rows(np.zeros((3, 3)), 4),
        lambda: rows_within(np.zeros((3, 3)), -0.1),
        lambda: rows_within(np.zeros((3, 3)), float("nan")),
        lambda: Reuse(2, depth=0),
    ],
)
def test_rows_that_there_are_not(call):
    with pytest.raises(InputError):
        call()

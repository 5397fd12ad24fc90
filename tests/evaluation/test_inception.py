"""The network of the papers' scores, and these by torch-fidelity's own code.

Its weights are a download, so these are drawn. torch-fidelity is installed apart (Makefile):
torchmetrics imports it where it finds it, and it imports torchvision, which does not load beside a
torch without CUDA. What it takes of torchvision as it loads is stood in for; nothing here uses it.
"""

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torchmetrics.image  # noqa: F401 (now: torch-fidelity cannot be found yet)
from torch import nn
from torch.utils.data import TensorDataset

from fastdiff.commands import evaluate
from fastdiff.data import ArrayDataset
from fastdiff.errors import InputError
from fastdiff.evaluation import published
from fastdiff.evaluation.distances import frechet_distance
from fastdiff.evaluation.features import feature_network, resized
from fastdiff.evaluation.neighbours import precision_recall
from fastdiff.evaluation.published import published_scores

APART = Path(sys.prefix) / "apart"
TAKEN = ("datasets", "models", "transforms", "transforms.functional")


def stand_in(name, patch):
    module, (parent, _, own) = ModuleType(name), name.rpartition(".")
    patch.setitem(sys.modules, name, module)
    if parent:
        setattr(sys.modules[parent], own, module)


@pytest.fixture(scope="module")
def fidelity():
    """torch_fidelity; skipped where it is not installed."""
    if not (APART / "torch_fidelity").is_dir():
        pytest.skip("torch-fidelity is not installed in the environment's folder apart/")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(APART)
        stand_in("torchvision", patch)
        for name in TAKEN:
            stand_in(f"torchvision.{name}", patch)
        for name in ("CIFAR10", "CIFAR100", "STL10"):
            setattr(sys.modules["torchvision.datasets"], name, type(name, (), {}))
        import torch_fidelity

        yield torch_fidelity
        for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def weights(fidelity, tmp_path_factory):
    """Drawn ones, with which pictures' features differ."""
    module = sys.modules["torch_fidelity.feature_extractor_inceptionv3"]
    kind, path = module.FeatureExtractorInceptionV3, tmp_path_factory.mktemp("w") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **options: None)
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        network = kind("inception-v3-compat", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
    torch.save(network.state_dict(), path)
    return path


def pictures(count, seed=0):
    """uint8 (count, 20, 20, 3), each of its own hue and coarseness."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 5, 5, 3)).repeat(4, 1).repeat(4, 2)
    return (coarse * rng.random((count, 1, 1, 3))).astype(np.uint8)


def tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def run(*arguments):
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    return evaluate.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.mark.seconds
def test_the_command_gives_torch_fidelitys_features(fidelity, weights, tmp_path):
    fake, real = pictures(4), pictures(5, seed=1)
    np.savez(tmp_path / "fake.npz", fake)
    np.savez(tmp_path / "real.npz", real)
    kept, out = tmp_path / "kept", tmp_path / "scores.json"
    code = run(
        "--samples", tmp_path / "fake.npz", "--data", tmp_path / "real.npz", "--device", "cpu",
        "--metrics", "prc,near", "--feature-weights", weights, "--features-dir", kept,
        "--out", out,
    )  # fmt: skip
    assert code == 0
    scores = json.loads(out.read_text())
    assert scores["published"] and scores["features"].startswith("inception ")
    assert scores["resizing"].startswith("bilinear as TensorFlow 1 had it")

    names = ["2048", "logits_unbiased"]
    extractor = sys.modules["torch_fidelity.utils"].create_feature_extractor(
        "inception-v3-compat", names, feature_extractor_weights_path=str(weights), cuda=False
    )
    layers = []
    extractor.Mixed_6d.branch1x1.register_forward_hook(lambda *args: layers.append(args[2]))
    with torch.no_grad():
        pooled, logits = extractor(tensor(fake))
    for kind, theirs in (("pooled", pooled), ("logits", logits)):
        ours = np.load(kept / "samples" / f"{kind}.npy")
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.std()))
        assert theirs.std(0).mean() > 0.1 * theirs.abs().mean()  # the pictures differ
    spatial = layers[0][:, :7].permute(0, 2, 3, 1).flatten(1)
    ours = np.load(kept / "samples" / "spatial.npy")
    np.testing.assert_allclose(ours, spatial, rtol=1e-4, atol=1e-4)


def test_scores_of_features_are_torch_fidelitys(fidelity):
    """Of the same features, in the order that torchmetrics draws."""
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(60, 24, generator=generator) for _ in range(2))
    fake = fake * 0.9 + 0.2
    modules = {name: sys.modules[f"torch_fidelity.metric_{name}"] for name in ("fid", "kid", "prc")}
    moments = [modules["fid"].fid_features_to_statistics(part) for part in (fake, real)]
    theirs = modules["fid"].fid_statistics_to_metric(*moments, verbose=False)
    ours = frechet_distance(fake.numpy(), real.numpy())
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)

    kid = modules["kid"].kid_features_to_metric(fake, real, kid_subset_size=60, verbose=False)
    expected = kid["kernel_inception_distance_mean"]
    assert published._kid(real, fake, seed=0)[0] == pytest.approx(expected, rel=1e-4)

    theirs = modules["prc"].calculate_precision_recall_full(fake, real)
    scores = precision_recall(real, fake)
    assert (scores["precision"], scores["recall"]) == pytest.approx(theirs, abs=1e-7)

    torch.manual_seed(3)
    order = torch.randperm(60)
    score = sys.modules["torch_fidelity.metric_isc"].isc_features_to_metric
    theirs = score(fake[order], splits=10, shuffle=False)
    mean, deviation = published._inception_score(fake, seed=3)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    # Of ten parts: torchmetrics divides by nine, torch-fidelity by ten.
    assert deviation * 0.9**0.5 == pytest.approx(theirs["inception_score_std"], rel=1e-4)


@pytest.mark.long
def test_all_scores_are_torch_fidelitys(fidelity, weights):
    fake, real = pictures(40), pictures(50, seed=1)
    theirs = fidelity.calculate_metrics(
        input1=TensorList(fake), input2=TensorList(real), cuda=False, cache=False, verbose=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights),
        isc=True, fid=True, kid=True, prc=True, kid_subset_size=40, isc_splits=1,
        samples_shuffle=False,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "SPLITS", 1)
        ours = published_scores(
            fake,
            ArrayDataset(real),
            ["fid", "is", "kid", "prc"],
            feature_network("inception", weights),
        )
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours["inception_score"][0] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    for name in ("precision", "recall"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6)
    spread = theirs["kernel_inception_distance_std"]
    assert abs(ours["kid"][0] - theirs["kernel_inception_distance_mean"]) < 0.5 * spread


class TensorList(TensorDataset):
    def __init__(self, images):
        super().__init__(tensor(images))

    def __getitem__(self, index):
        return super().__getitem__(index)[0]


@pytest.mark.seconds
def test_antialiased_pictures_are_shown_in_the_networks_own_size(fidelity, weights):
    network = feature_network("inception", weights, resize="antialiased")
    assert network.resizing == "bicubic, antialiased, to 299x299, and rounded to bytes"
    assert network.name.endswith(" antialiased") and not network.published
    shown = []
    network.network.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    large = tensor(pictures(1)).repeat_interleave(20, 2).repeat_interleave(20, 3)
    with torch.no_grad():
        network(large)
    assert torch.equal(shown[0], resized(large, 299).round().to(torch.uint8))


def test_weights_of_something_else(fidelity, tmp_path):
    other = tmp_path / "other.pth"
    torch.save(nn.Linear(2, 2).state_dict(), other)
    with pytest.raises(InputError, match="holds the weights of another network: expected weights-"):
        feature_network("inception", other)
    other.write_text("<html>404</html>")
    with pytest.raises(InputError, match="is no file of weights: expected weights-inception-2015"):
        feature_network("inception", other)


def test_a_torchvision_that_does_not_load_is_said(fidelity, monkeypatch, tmp_path):
    """With torch-fidelity there, torchmetrics needs it too."""
    (tmp_path / "w.pth").write_text("")
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.inception", None)
    with pytest.raises(InputError) as caught:
        feature_network("inception", tmp_path / "w.pth")
    assert "'torchvision', which is not installed" in str(caught.value)
    assert "install that, or use another network of --features" in str(caught.value)
    with pytest.raises(InputError, match="install that, or uninstall torch-fidelity"):
        published._inception_score(torch.zeros(20, 3), seed=0)

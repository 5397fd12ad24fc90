"""The scores that papers report: FID, sFID, Inception score, KID, precision and recall."""

import hashlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.data.dataset import ArrayDataset, ImageDataset, check_bytes
from fastdiff.errors import InputError
from fastdiff.evaluation.distances import frechet_from_moments
from fastdiff.evaluation.features import FeatureNetwork, beside_torchvision
from fastdiff.evaluation.neighbours import nearest, precision_recall
from fastdiff.evaluation.reference import NAMES, Moments, moments_of, write_reference
from fastdiff.evaluation.scores import samples_like
from fastdiff.evaluation.store import FeatureStore
from fastdiff.ranks import ALONE, Ranks

# Metric -> the kinds of features it takes.
METRICS = {
    "fid": {"pooled"},
    "sfid": {"spatial"},
    "is": {"logits"},
    "kid": {"pooled"},
    "prc": {"pooled"},
    "near": {"pooled"},
}
OF_MOMENTS = {"fid": "pooled", "sfid": "spatial"}  # which moments of the real images are enough for
KID_SUBSETS, KID_SIZE = 100, 1000  # Bińkowski et al. 2018
SPLITS = 10  # of the Inception score, Salimans et al. 2016
KNOWN_BY = 256  # images by which a set that does not lie in memory is known again
SPACED = 2000  # real images whose distance to the next one says how near is too near

Progress = Callable[[str, int], Callable[[int], Any]]


class FeaturesOf:
    """The features of a set of images by one network, computed where the folder lacks them."""

    def __init__(
        self,
        images: ImageDataset,
        network: FeatureNetwork,
        folder: Path,
        *,
        batch: int,
        device: torch.device | str,
        ranks: Ranks,
        progress: Callable[[int], Callable[[int], Any]],
    ) -> None:
        self.images, self.network, self.device = images, network, device
        about = {"network": network.name, "resizing": network.resizing, **known_by(images)}
        self.store = FeatureStore(folder, about, len(images), network.widths, ranks)
        self.store.fill(self._features, batch, progress)

    @torch.inference_mode()
    def _features(self, indices: np.ndarray) -> Mapping[str, Tensor]:
        images = self.images.gather(indices).to(self.device)
        return self.network(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)

    def moments(self, kind: str) -> Moments:
        return moments_of(self.store.chunks(kind))


def known_by(images: ImageDataset) -> dict[str, Any]:
    """What tells this set from others: how many, of which size, and all or some of them."""
    chosen = np.arange(len(images))
    if not isinstance(images, ArrayDataset):
        chosen = np.unique(np.linspace(0, len(images) - 1, KNOWN_BY).astype(np.int64))
    digest = hashlib.sha256(images.gather(chosen).numpy().tobytes()).hexdigest()
    return {"images": len(images), "size": list(images.image_size), "content": digest}


def published_scores(
    samples: np.ndarray,
    real: ImageDataset | Mapping[str, Moments],
    metrics: Sequence[str],
    network: FeatureNetwork,
    *,
    folder: str | Path | None = None,
    write_moments: str | Path | None = None,
    batch: int = 64,
    k: int = 3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
    progress: Progress = lambda what, images: lambda done: None,
) -> dict[str, Any]:
    """Scores of samples by a network's features; a dictionary that JSON can hold.

    - ``fid`` (Heusel et al. 2017, eq. 6) and ``sfid`` (Nash et al. 2021), squared Fréchet distances
    - ``inception_score``: its mean and standard deviation over 10 parts (Salimans et al. 2016)
    - ``kid``: of 100 subsets of 1,000, mean and standard deviation (Bińkowski et al. 2018)
    - ``precision``, ``recall``, ``density``, ``coverage``: see ``precision_recall``
    - near: ``copies``, the share of samples nearer to a real image than all but 1 % of these are to
      each other; ``class_coverage``, the share of the classes of real images that are some sample's
      nearest (None without labels)

    Args:
        samples: uint8 (N, H, W, C), C of 1 or 3.
        real: the real images; or their moments, which FID and sFID need no more of.
        metrics: names of METRICS.
        folder: keeps the features, so that a run that was cut goes on, and the next one finds those
            of the real images; on a disk that all ranks share. None: they are thrown away.
        write_moments: a file for the real images' moments (``reference.write_reference``).
        batch: images at a time.
        k: of the neighbourhoods of precision and recall.
        seed: of the subsets and the parts.
        device: where the network lies.
        ranks: the processes that share the work; all call, and get the same.
        progress: ``progress(what, images)``, with as many as this rank still has to compute, makes
            what is told of each batch's size.

    Raises InputError for metrics without what they need, and images of no use.
    """
    check_metrics(metrics)
    check_kinds(metrics, network)
    if not isinstance(real, ImageDataset):
        _check_moments(real, metrics, network)
        if write_moments is not None:
            raise InputError("the moments are those of a file already: give the real images")
    elif "prc" in metrics and min(len(real), len(samples)) <= k:
        few = min(len(real), len(samples))
        raise InputError(f"{few} images; precision and recall need more than k={k}")
    if isinstance(real, ImageDataset):
        samples_like(samples, real)
    fake = ArrayDataset(samples)
    sets = {"samples": fake, **({"real": real} if isinstance(real, ImageDataset) else {})}
    for name, images in sets.items():
        check_scored(images, f"a score of the {name}")
    with ExitStack() as stack:
        place = _place(folder, ranks, stack)
        found = {
            name: FeaturesOf(
                images,
                network,
                place / name,
                batch=batch,
                device=device,
                ranks=ranks,
                progress=partial(progress, name),
            )
            for name, images in sets.items()
        }

        def finished() -> dict[str, Any]:
            if write_moments is not None:
                kinds = [kind for kind in NAMES if kind in network.widths]
                moments = {kind: found["real"].moments(kind) for kind in kinds}
                write_reference(write_moments, moments, network.name)
            scores = _scores(found, real, metrics, k=k, seed=seed, device=device)
            return {**_about(network, fake, real), **scores}

        return ranks.on_first(finished)


def check_metrics(names: Sequence[str]) -> None:
    """InputError where one of them is none."""
    for name in names:
        if name not in METRICS:
            raise InputError(f"metric {name!r}: expected some of {', '.join(METRICS)}")


def check_kinds(metrics: Sequence[str], network: FeatureNetwork) -> None:
    """InputError where one of them rests on features that the network does not give."""
    for name in metrics:
        for kind in METRICS[name] - network.widths.keys():
            raise InputError(
                f"metric {name!r} needs {kind} features, which {network.name} has not: leave it "
                "out, or choose --features inception"
            )


def _check_moments(
    real: Mapping[str, Moments], metrics: Sequence[str], network: FeatureNetwork
) -> None:
    for name in metrics:
        if name == "is":
            continue
        if name not in OF_MOMENTS:
            raise InputError(f"metric {name!r} needs the real images, and got their moments alone")
        kind = OF_MOMENTS[name]
        if kind not in real:
            raise InputError(f"the reference holds no moments of {kind} features")
        width, theirs = network.widths[kind], len(real[kind].mean)
        if width != theirs:
            raise InputError(
                f"the reference is of {theirs} features, the network has {width}: it is another "
                "network's"
            )


def _place(folder: str | Path | None, ranks: Ranks, stack: ExitStack) -> Path:
    if folder is not None:
        return Path(folder)
    return Path(ranks.on_first(lambda: stack.enter_context(tempfile.TemporaryDirectory())))


def check_scored(images: ImageDataset, purpose: str) -> None:
    """InputError unless these networks can be shown such images. purpose: what needs it."""
    check_bytes(images, purpose)
    if images.channels not in (1, 3):
        raise InputError(
            f"{purpose} needs grey or coloured images, these have {images.channels} channels: give "
            "1 or 3 (--channels)"
        )
    if len(images) < 2:
        raise InputError(f"{purpose} needs at least 2 images, these are {len(images)}")


def _about(
    network: FeatureNetwork, fake: ImageDataset, real: ImageDataset | Mapping[str, Moments]
) -> dict[str, Any]:
    notes = []
    if not network.published:
        notes.append(
            f"{network.name} is not the network of the papers: compare these figures with each "
            "other alone"
        )
    for name, images in (("samples", fake), ("real images", real)):
        width = network.widths["pooled"]
        if isinstance(images, ImageDataset) and len(images) <= width:
            notes.append(
                f"{len(images):,} {name} for {width:,} features: their covariance lacks rank, and "
                "a Fréchet distance comes out far too large; papers take 50,000"
            )
    return {
        "features": network.name,
        "published": network.published,
        "resizing": network.resizing,
        "samples": len(fake),
        "real": len(real) if isinstance(real, ImageDataset) else None,
        "notes": notes,
    }


def _scores(
    found: Mapping[str, FeaturesOf],
    real: ImageDataset | Mapping[str, Moments],
    metrics: Sequence[str],
    *,
    k: int,
    seed: int,
    device: torch.device | str,
) -> dict[str, Any]:
    fake = found["samples"]
    scores: dict[str, Any] = {}
    for name in metrics:
        if name in OF_MOMENTS:
            kind = OF_MOMENTS[name]
            moments = real[kind] if isinstance(real, Mapping) else found["real"].moments(kind)
            scores[name] = _frechet(fake.moments(kind), moments)
        elif name == "is":
            scores["inception_score"] = _inception_score(fake.store.all("logits"), seed)
        else:
            theirs, ours = (found[which].store.all("pooled") for which in ("real", "samples"))
            if name == "kid":
                scores["kid"] = _kid(theirs, ours, seed)
            elif name == "prc":
                scores |= precision_recall(theirs, ours, k=k, device=device)
            else:
                scores |= _near(theirs, ours, found["real"].images, device)
    return scores


def _near(
    real: Tensor, fake: Tensor, images: ImageDataset, device: torch.device | str
) -> dict[str, Any]:
    chosen = torch.arange(0, len(real), max(1, len(real) // SPACED))
    among_real, _ = nearest(real[chosen], real, device, itself=chosen)
    distances, which = nearest(fake, real, device)
    copies = (distances < among_real.quantile(0.01)).double().mean()
    covered = None
    if images.labels is not None and images.num_classes:
        covered = len(np.unique(images.labels[which.numpy()])) / images.num_classes
    return {"copies": float(copies), "class_coverage": covered}


def _frechet(fake: Moments, real: Moments) -> float:
    both = (fake.mean, fake.covariance, real.mean, real.covariance)
    return frechet_from_moments(*(tensor.numpy() for tensor in both))


def _inception_score(logits: Tensor, seed: int) -> list[float]:
    options = {"splits": min(SPLITS, len(logits))}
    return _by_torchmetrics("inception", "InceptionScore", options, seed, (logits,))


def _kid(real: Tensor, fake: Tensor, seed: int) -> list[float]:
    options = {"subsets": KID_SUBSETS, "subset_size": min(KID_SIZE, len(real), len(fake))}
    updates = (real, True), (fake, False)
    return _by_torchmetrics("kid", "KernelInceptionDistance", options, seed, *updates)


def _by_torchmetrics(
    module: str, name: str, options: Mapping[str, int], seed: int, *updates: tuple[Any, ...]
) -> list[float]:
    """Its answer for features, by this process alone; its draws are torch's own."""
    package = beside_torchvision(
        f"torchmetrics.image.{module}", "evaluate", "uninstall torch-fidelity"
    )
    given = _Given(updates[0][0].shape[1])
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Its own sums would wait for the other ranks, which have no metric.
        metric = getattr(package, name)(given, sync_on_compute=False, **options)
        for update in updates:
            metric.update(*update)
        return [float(value) for value in metric.compute()]


class _Given(nn.Module):
    """For torchmetrics a network whose features are its input."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric .* will save all extracted features")
        yield

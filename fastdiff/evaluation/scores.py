"""Scoring samples against the real images they should resemble."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.data.dataset import ImageDataset, check_bytes
from fastdiff.errors import InputError
from fastdiff.evaluation.classifier import MEMBERS, Classifier, train_classifier
from fastdiff.evaluation.distances import (
    frechet_distance,
    nearest_distances,
)
from fastdiff.images import to_uint8
from fastdiff.ranks import ALONE, Ranks

DRAWS = 100  # random subsets behind each Fréchet distance
MAX_REAL_BYTES = 1 << 30  # of real images compared with
MAX_REAL = 50_000
MAX_QUERIES = 2_000  # images whose nearest neighbour is sought
MIN_PER_CLASS = 10  # real images a class needs before a classifier is worth training


def evaluate(
    samples: np.ndarray,
    dataset: ImageDataset,
    *,
    labels: np.ndarray | None = None,
    seed: int = 0,
    classifier_steps: int | None = None,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Score samples against a data set; returns a dictionary that JSON can hold.

    The data set's own labels (opened with ``class_cond=True`` or None) train a classifier that
    knows nothing of the samples; without labels the parts that need it are None. The parts:

    - ``confidence``: mean largest class probability of samples, held-out real images and pure
      noise (standard Gaussian, clipped): the last two say what the first is worth.
    - ``classes``: each class' share of the samples, the largest share, the classes that are
      absent.
    - ``label_agreement``: share of samples recognised as what ``labels`` asks for.
    - ``frechet``: squared Fréchet distances (``frechet_distance``) on the classifier's hidden
      features, or, without a classifier, on pixels averaged down to at most 8x8. ``samples``:
      samples to real images; ``noise``: noise to real images; ``halves``: real to other real
      images. All three compare ``count`` with ``count`` images (half the real images, or all
      samples if those are fewer), because the distance depends on how many there are. Each is the
      mean over 100 random draws: the distance between two halves of the 1,797 digits scatters by
      a third from one halving to the next (measured: 9.1 ± 3.1), their mean by 3 %. ``ratio`` is
      samples / halves (1: as close as real images are to each other); the scale of the features,
      which changes with the classifier, cancels in it.
    - ``nearest``: Euclidean distance, in units of [-1, 1], to the nearest real image: of samples,
      of real images (themselves left out) and of noise. Samples much nearer than real images are
      remembered, not generated; ``closer_than_real`` is the share of samples nearer than all but
      1 % of the real images, ``copies`` the number at distance 0.

    Args:
        samples: uint8 (N, H, W, C), N ≥ 2.
        dataset: the real images.
        labels: integers (N,), the classes the samples were asked to show, or None.
        seed: of the classifier, the noise and the draws.
        classifier_steps: of each of the classifier's members; None: by the number of images.
        device: where the classifier runs.
        ranks: the processes that share the work, each given the same; all get the report.

    Raises InputError when the samples have another size or channel count than the data.
    """
    real, real_labels, real_total = ranks.together(lambda: _real_images(dataset, seed))
    fake = ranks.together(lambda: samples_like(samples, dataset))
    noise = _pure_noise(real[:2000].shape, seed)
    report: dict[str, Any] = {
        "samples": {"count": len(fake), "shape": list(samples.shape[1:])},
        "real": {"count": len(real), "total": real_total},
    }
    reason = _why_no_classifier(dataset, real_labels)
    classifier = None
    if reason is None:
        names = dataset.class_names or []
        ranks.together(lambda: _check_labels(labels, len(fake), len(names)))
        classifier = train_classifier(
            real,
            real_labels,
            len(names),
            seed=seed,
            steps=classifier_steps,
            device=device,
            ranks=ranks,
        )
    else:
        report["no_classifier"] = reason
    report |= _recognition(classifier, fake, real, real_labels, noise, labels, dataset)
    of_fake, of_real, of_noise = (_features(classifier, images) for images in (fake, real, noise))
    others = {"samples": of_fake, "noise": of_noise}
    report["frechet"] = _frechet(of_real, others, seed, DRAWS, ranks)
    report["frechet"]["features"] = "classifier" if classifier else "pixels averaged to 8x8"
    report["nearest"] = _nearest(fake, real, noise, seed, device, ranks)
    return report


def _real_images(dataset: ImageDataset, seed: int) -> tuple[Tensor, Tensor, int]:
    """Real images (n, C, H, W) and labels: all, or a random part that fits in memory."""
    check_bytes(dataset, "a comparison with samples")
    total = len(dataset)
    if total < 4:
        raise InputError(f"the data set holds {total} images, expected at least 4")
    bytes_each = dataset.channels * dataset.image_size[0] * dataset.image_size[1]
    count = min(total, MAX_REAL, max(MAX_REAL_BYTES // bytes_each, 1))
    chosen = np.arange(total)
    if count < total:
        chosen = np.sort(np.random.default_rng(seed).choice(total, count, replace=False))
    parts = [dataset.gather(part) for part in np.array_split(chosen, -(-count // 1000))]
    return torch.cat(parts), dataset.gather_labels(chosen), total


def samples_like(samples: np.ndarray, dataset: ImageDataset) -> Tensor:
    """Samples (N, C, H, W). InputError where they are of another kind or size than the data."""
    if samples.dtype != np.uint8 or samples.ndim != 4 or len(samples) < 2:
        raise InputError(
            f"samples are {samples.dtype} {samples.shape}, expected uint8 (N, H, W, C) with N >= 2"
        )
    expected = (*dataset.image_size, dataset.channels)
    if samples.shape[1:] != expected:
        height, width, channels = samples.shape[1:]
        raise InputError(
            f"the samples are {height}x{width} with {channels} channel(s), the data are "
            f"{expected[0]}x{expected[1]} with {expected[2]}: choose with --image-size, --channels"
        )
    return torch.from_numpy(np.ascontiguousarray(samples.transpose(0, 3, 1, 2)))


def _pure_noise(shape: torch.Size, seed: int) -> Tensor:
    return to_uint8(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def _why_no_classifier(dataset: ImageDataset, labels: Tensor) -> str | None:
    if dataset.num_classes is None:
        return "the data have no labels"
    if dataset.num_classes < 2:
        return "the data have a single class"
    counts = torch.bincount(labels, minlength=dataset.num_classes)
    if counts.min() < MIN_PER_CLASS:
        return f"a class has only {int(counts.min())} images, {MIN_PER_CLASS} are needed"
    return None


def _recognition(
    classifier: Classifier | None,
    fake: Tensor,
    real: Tensor,
    real_labels: Tensor,
    noise: Tensor,
    labels: np.ndarray | None,
    dataset: ImageDataset,
) -> dict[str, Any]:
    """What the classifier sees in the samples."""
    if classifier is None:
        return {"classifier": None, "confidence": None, "classes": None, "label_agreement": None}
    held_out = torch.from_numpy(classifier.held_out)
    seen, held_out_seen, noise_seen = (
        classifier(images)[0] for images in (fake, real[held_out], noise)
    )
    recognised = seen.argmax(1)
    names = dataset.class_names or []
    shares = torch.bincount(recognised, minlength=len(names)) / len(fake)
    return {
        "classifier": {
            "members": MEMBERS,
            "trained_on": len(real) - len(held_out),
            "held_out": len(held_out),
            "held_out_accuracy": _mean(held_out_seen.argmax(1) == real_labels[held_out]),
        },
        "confidence": {
            "samples": _mean(seen.amax(1)),
            "real": _mean(held_out_seen.amax(1)),
            "noise": _mean(noise_seen.amax(1)),
        },
        "classes": {
            "shares": {name: float(share) for name, share in zip(names, shares, strict=True)},
            "max_share": float(shares.max()),
            "absent": [name for name, share in zip(names, shares, strict=True) if share == 0],
        },
        "label_agreement": (
            None if labels is None else _mean(recognised == torch.from_numpy(labels))
        ),
    }


def _check_labels(labels: np.ndarray | None, count: int, num_classes: int) -> None:
    if labels is None:
        return
    if labels.shape != (count,) or not 0 <= labels.min() <= labels.max() < num_classes:
        raise InputError(
            f"the samples' labels are {labels.shape} from {labels.min()} to {labels.max()}, "
            f"expected ({count},) from 0 to {num_classes - 1}"
        )


def _features(classifier: Classifier | None, images: Tensor) -> np.ndarray:
    if classifier is not None:
        return classifier(images)[1]
    side = min(8, images.shape[2]), min(8, images.shape[3])
    parts = [F.adaptive_avg_pool2d(part.double() / 127.5 - 1, side) for part in images.split(256)]
    return torch.cat(parts).flatten(1).numpy()


def _frechet(
    real: np.ndarray, others: dict[str, np.ndarray], seed: int, draws: int, ranks: Ranks
) -> dict[str, Any]:
    """Distances between equal counts of features, over the same random draws."""
    rng = np.random.default_rng(seed)
    count = min(len(real) // 2, *map(len, others.values()))
    sets = {"halves": real, **others}

    def draw() -> tuple[np.ndarray, ...]:
        order = rng.permutation(len(real))[: 2 * count]
        chosen = (rng.permutation(len(other))[:count] for other in others.values())
        return order[:count], order[count:], *chosen

    def distances(chosen: tuple[np.ndarray, ...]) -> list[float]:
        first, *rest = chosen
        pairs = zip(sets.values(), rest, strict=True)
        return [frechet_distance(features[other], real[first]) for features, other in pairs]

    found = np.array(ranks.each(distances, [draw() for _ in range(draws)]))
    result: dict[str, Any] = {"count": count, "draws": draws}
    result |= dict(zip(sets, found.mean(0).tolist(), strict=True))
    result |= dict(zip((f"{name}_std" for name in sets), found.std(0).tolist(), strict=True))
    result["ratio"] = result["samples"] / result["halves"] if result["halves"] else None
    return result


class FrechetRatio:
    """The Fréchet ratio of many sets of samples to one data set: ``evaluate``'s, by one classifier.

    Args: as ``evaluate``'s; ``draws``: random draws behind a ratio.

    Raises InputError as ``evaluate`` does.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        seed: int = 0,
        classifier_steps: int | None = None,
        device: torch.device | str = "cpu",
        draws: int = 20,
    ) -> None:
        self.dataset, self.seed, self.draws = dataset, seed, draws
        real, labels, _ = _real_images(dataset, seed)
        self.classifier: Classifier | None = None
        if _why_no_classifier(dataset, labels) is None:
            self.classifier = train_classifier(
                real,
                labels,
                len(dataset.class_names or []),
                seed=seed,
                steps=classifier_steps,
                device=device,
            )
        self.real = _features(self.classifier, real)

    def __call__(self, samples: np.ndarray) -> float:
        """Of uint8 (N, H, W, C), N ≥ 2: 1 where they are as close as real images are."""
        fake = _features(self.classifier, samples_like(samples, self.dataset))
        found = _frechet(self.real, {"samples": fake}, self.seed, self.draws, ALONE)["ratio"]
        return float("nan") if found is None else found


def _nearest(
    fake: Tensor,
    real: Tensor,
    noise: Tensor,
    seed: int,
    device: torch.device | str,
    ranks: Ranks,
) -> dict[str, Any]:
    """Distances to the nearest real image."""
    rng = np.random.default_rng(seed)

    references = real.to(device)

    def distances(images: Tensor) -> np.ndarray:
        def of(chosen: Tensor) -> np.ndarray:
            itself = chosen.to(device) if images is real else None
            return nearest_distances(images[chosen].to(device), references, leave_out=itself)

        chosen = torch.from_numpy(rng.permutation(len(images))[:MAX_QUERIES])
        return np.concatenate(ranks.each(of, chosen.tensor_split(ranks.count)))

    of_real, of_fake, of_noise = map(distances, (real, fake, noise))
    result: dict[str, Any] = {
        name: {"mean": float(values.mean()), "min": float(values.min()), "count": len(values)}
        for name, values in (("samples", of_fake), ("real", of_real), ("noise", of_noise))
    }
    result["closer_than_real"] = float(np.mean(of_fake < np.percentile(of_real, 1)))
    result["copies"] = int((of_fake == 0).sum())
    return result


def _mean(values: Tensor) -> float:
    return float(values.double().mean())

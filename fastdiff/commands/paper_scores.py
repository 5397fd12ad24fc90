"""``fastdiff evaluate --metrics``: the scores that papers report."""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastdiff.checks import choose_device
from fastdiff.data import ImageDataset
from fastdiff.errors import InputError
from fastdiff.evaluation.features import NETWORKS, RESIZES, feature_network
from fastdiff.evaluation.published import METRICS, check_metrics, published_scores
from fastdiff.evaluation.reference import NAMES, Moments, read_reference
from fastdiff.images import check_range, to_float, to_uint8
from fastdiff.optional import require
from fastdiff.ranks import Ranks

TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception score",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "copies": "copies",
    "class_coverage": "class coverage",
}


OWN = ("feature_weights", "reference", "write_reference", "features_dir", "truncate")
DEFAULTS = {"features": "inception", "resize": "own", "feature_batch": 64, "k": 3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scores of the papers")
    group.add_argument(
        "--metrics",
        metavar="NAMES",
        help=f"these scores instead, separated by commas: {', '.join(METRICS)} (prc: precision, "
        "recall, density, coverage; near: copies, class coverage)",
    )
    group.add_argument(
        "--features",
        choices=NETWORKS,
        help="the network they rest on (default: inception, the papers'; efficientnet-lite0 needs "
        "no download, and its figures stand beside each other alone)",
    )
    group.add_argument(
        "--feature-weights",
        metavar="PATH",
        help="the file of Inception's weights; the folder of dinov2's or clip's (transformers)",
    )
    group.add_argument(
        "--resize",
        choices=RESIZES,
        help="how images come to the network's size: own (default), as its published scores have "
        "it; antialiased, bicubic, which is own for all but inception",
    )
    group.add_argument(
        "--truncate",
        action="store_true",
        default=None,
        help="cut samples given as floats to bytes, as published scripts do, instead of rounding",
    )
    group.add_argument(
        "--reference",
        metavar="FILE.npz",
        help="the moments of the real images, as guided-diffusion's reference batches hold them, "
        "in place of --data (for fid and sfid)",
    )
    group.add_argument(
        "--write-reference", metavar="FILE.npz", help="write those of --data, for the next time"
    )
    group.add_argument(
        "--features-dir",
        metavar="DIR",
        help="keep the features there: a run that was cut goes on, and the real images' are "
        "computed once",
    )
    group.add_argument(
        "--feature-batch", type=int, metavar="N", help="images at a time (default: 64)"
    )
    group.add_argument(
        "--k", type=int, help="of the neighbourhoods of prc: to the k-th (default: 3)"
    )


def chosen(args: argparse.Namespace) -> list[str]:
    """The metrics asked for; none without --metrics. InputError for flags that need it."""
    if args.metrics is None:
        for flag in (*OWN, *DEFAULTS):
            if getattr(args, flag) is not None:
                raise InputError(f"--{flag.replace('_', '-')} goes with --metrics")
        return []
    names = [name.strip() for name in args.metrics.split(",") if name.strip()]
    if not names:
        raise InputError(f"--metrics names none: expected some of {', '.join(METRICS)}")
    if args.classifier_steps is not None:
        raise InputError("--classifier-steps goes without --metrics")
    check_metrics(names)
    for flag, default in DEFAULTS.items():
        if getattr(args, flag) is None:
            setattr(args, flag, default)
    for flag in ("feature_batch", "k"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} must be positive")
    return list(dict.fromkeys(names))


def as_bytes(images: np.ndarray, name: str, truncate: bool | None) -> tuple[np.ndarray, str]:
    """Samples as uint8, and how they became so. InputError: floats outside [-1, 1], and bytes where
    they are to be cut."""
    if images.dtype == np.uint8:
        if truncate:
            raise InputError(f"{name} is uint8 already: --truncate goes with uint16 and floats")
        return images, "none, given as bytes"
    check_range(images, name)
    rounding = "truncate" if truncate else "nearest"
    return to_uint8(to_float(torch.from_numpy(images)), rounding).numpy(), rounding


def scored(
    args: argparse.Namespace,
    metrics: list[str],
    samples: np.ndarray,
    dataset: ImageDataset | None,
    ranks: Ranks,
) -> dict[str, Any]:
    """The scores: a call of all ranks."""
    device = choose_device(ranks.device)
    images, rounding = ranks.together(
        lambda: as_bytes(samples, f"'{args.samples}': arr_0", args.truncate)
    )
    network = ranks.together(
        lambda: feature_network(args.features, args.feature_weights, device, args.resize)
    )
    real: Any = dataset
    if real is None:
        real = ranks.together(lambda: _reference(args.reference, network.name))
    scores = published_scores(
        images,
        real,
        metrics,
        network,
        folder=args.features_dir,
        write_moments=args.write_reference,
        batch=args.feature_batch,
        k=args.k,
        seed=args.seed,
        device=device,
        ranks=ranks,
        progress=_bar if ranks.rank == 0 else lambda what, images: lambda done: None,
    )
    return {"rounding": rounding, **scores}


def lines_of(scores: dict[str, Any]) -> str:
    """For a terminal."""
    of = "" if scores["real"] is None else f" against {scores['real']:,} real images"
    lines = [
        f"{scores['samples']:,} samples{of}, features of {scores['features']} "
        f"({scores['resizing']})",
        f"{'rounding':18}{scores['rounding']}",
    ]
    for name, title in TITLES.items():
        if scores.get(name) is not None:
            lines.append(f"{title:18}{_figure(scores[name])}")
    return "\n".join(lines + [f"note: {note}" for note in scores["notes"]])


def _figure(value: Any) -> str:
    if isinstance(value, list):
        return f"{value[0]:.5g} ± {value[1]:.2g}"
    return f"{value:.5g}"


def _reference(path: str, features: str) -> dict[str, Moments]:
    found = read_reference(path, features)
    if found is None:
        pairs = ", ".join(" and ".join(names) for names in NAMES.values())
        raise InputError(f"'{path}' holds no moments ({pairs}); give images to --data")
    return found


def _bar(what: str, images: int) -> Callable[[int], Any]:
    tqdm = require("tqdm", "train").tqdm
    name = f"features of {what}"
    bar = tqdm(total=images, desc=name, unit="image", leave=False, disable=not images)

    def told(done: int) -> None:
        bar.update(done)
        if bar.n >= images:
            bar.close()

    return told

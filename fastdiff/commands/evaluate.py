"""``fastdiff evaluate``: how close samples come to the real images."""

import argparse
from typing import Any

import numpy as np

from fastdiff.checks import choose_device
from fastdiff.commands import paper_scores
from fastdiff.commands.data_options import KINDS_OF_DATA, add_reading_arguments, reading_options
from fastdiff.commands.output import said_once
from fastdiff.commands.reports import check_report, write_report
from fastdiff.data import ImageDataset, load_dataset
from fastdiff.data.classes import numbers, renumber
from fastdiff.data.spaced import evenly_spaced
from fastdiff.errors import InputError
from fastdiff.evaluation import evaluate, format_report
from fastdiff.images import Samples, check_channels_last, read_samples
from fastdiff.ranks import Ranks, join


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--samples", required=True, metavar="FILE.npz", help="samples, as `sample` writes them"
    )
    parser.add_argument("--data", help=f"real images: {KINDS_OF_DATA}")
    parser.add_argument(
        "--image-size", type=int, help="resize and crop the real images to this side"
    )
    parser.add_argument("--channels", type=int, choices=(1, 3, 4), help="of the real images")
    parser.add_argument(
        "--num", type=int, help="how many real images, evenly spaced in the set (default: all)"
    )
    add_reading_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the classifier and random draws")
    parser.add_argument("--classifier-steps", type=int, help="training steps of the classifier")
    parser.add_argument("--device", help="cpu, cuda, …; by default cuda if there is one")
    parser.add_argument("--out", metavar="FILE.json", help="write the figures there as well")
    paper_scores.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.seed < 0 or (args.classifier_steps is not None and args.classifier_steps < 1):
        raise InputError("--seed must not be negative and --classifier-steps must be positive")
    if args.num is not None and (args.num < 1 or args.data is None):
        raise InputError("--num must be positive: how many images of --data")
    metrics = paper_scores.chosen(args)
    if (args.data is None) == (args.reference is None):
        raise InputError("give the real images by --data, or with --metrics their --reference")
    ranks = join(args.device)
    with ranks.heard(), said_once(ranks):
        samples, dataset = ranks.together(lambda: _read(args))
        sizes = {"samples": len(samples.images), "real images": len(dataset or ())}
        ranks.agree({f"the number of {name}": size for name, size in sizes.items()})
        if args.out:
            ranks.on_first(lambda: check_report(args.out, ("samples", "real")))
        if metrics:
            report = paper_scores.scored(args, metrics, samples.images, dataset, ranks)
            text = paper_scores.lines_of(report)
            ranks.on_first(lambda: _finish(args, report, text))
        else:
            assert dataset is not None
            report = _judged(args, samples, dataset, ranks)
            ranks.on_first(lambda: _finish(args, report, format_report(report)))
        ranks.leave()
    return 0


def _judged(
    args: argparse.Namespace, samples: Samples, dataset: ImageDataset, ranks: Ranks
) -> dict[str, Any]:
    """By a classifier of the data's own classes."""
    labels = ranks.together(lambda: _labels(samples, dataset))
    report = evaluate(
        samples.images,
        dataset,
        labels=labels,
        seed=args.seed,
        classifier_steps=args.classifier_steps,
        device=choose_device(ranks.device),
        ranks=ranks,
    )
    report["samples"]["file"], report["real"]["data"] = str(args.samples), str(args.data)
    return report


def _read(args: argparse.Namespace) -> tuple[Samples, ImageDataset | None]:
    deep = args.metrics is not None
    samples = read_samples(args.samples, deep=deep)
    check_channels_last(samples.images, f"'{args.samples}': arr_0", deep=deep)
    if args.data is None:
        return samples, None
    dataset = load_dataset(
        args.data,
        image_size=args.image_size,
        class_cond=None,
        channels=args.channels,
        known_classes=samples.class_names or (),
        **reading_options(vars(args)),
    )
    print(dataset.describe(), flush=True)
    return samples, evenly_spaced(dataset, args.num)


def _finish(args: argparse.Namespace, report: dict[str, Any], text: str) -> None:
    if args.out:  # before anything can go wrong with printing
        write_report(args.out, report)
    print(text)


def _labels(samples: Samples, dataset: ImageDataset) -> np.ndarray | None:
    """The classes the samples were asked to show, numbered as the real images' are.

    By name where the file has names (`sample` writes them) and the real images too. The numbers
    of a file without names stand for themselves, if there are so many classes; where the real
    images have names that this leaves unsaid, a line says so.
    """
    labels, names, known = samples.labels, samples.class_names, dataset.class_names
    if labels is None or known is None:
        return labels
    found = numbers(len(known)) if names is None else names
    if len(wrong := labels[(labels < 0) | (labels >= len(found))]):
        whose = "--data has" if names is None else "--samples names"
        raise InputError(
            f"--samples has the label {wrong[0]}; {whose} {len(found)} classes, 0 to "
            f"{len(found) - 1}"
        )
    mapping = renumber(
        found,
        known,
        np.unique(labels),
        by_number=names is None or (dataset.numbered and names != numbers(len(names))),
        ours="--samples",
        theirs="--data",
    )
    if names is None and known != found:
        print("labels of --samples have no names: matched by number", flush=True)
    return mapping[labels]

"""``fastdiff evaluate``: how close samples come to the real images."""

import argparse

from fastdiff.commands._reports import check_report, write_report
from fastdiff.data import load_dataset
from fastdiff.errors import InputError
from fastdiff.evaluation import evaluate, format_report
from fastdiff.images import load_samples_npz
from fastdiff.training.checks import choose_device

HELP = "score samples against real images: recognition, class shares, Fréchet, memorising"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--samples", required=True, metavar="FILE.npz", help="samples, as `sample` writes them"
    )
    parser.add_argument(
        "--data", required=True, help="real images: 'digits', a folder, a .npz file, CIFAR-10"
    )
    parser.add_argument(
        "--image-size", type=int, help="resize and crop the real images to this side"
    )
    parser.add_argument("--channels", type=int, choices=(1, 3, 4), help="of the real images")
    parser.add_argument("--seed", type=int, default=0, help="of the classifier and random draws")
    parser.add_argument("--classifier-steps", type=int, help="training steps of the classifier")
    parser.add_argument("--device", help="cpu, cuda, …; by default cuda if there is one")
    parser.add_argument("--out", metavar="FILE.json", help="write the figures there as well")


def run(args: argparse.Namespace) -> int:
    if args.seed < 0 or (args.classifier_steps is not None and args.classifier_steps < 1):
        raise InputError("--seed must not be negative and --classifier-steps must be positive")
    samples, labels = load_samples_npz(args.samples)
    dataset = load_dataset(
        args.data, image_size=args.image_size, class_cond=None, channels=args.channels
    )
    if args.out:
        check_report(args.out, ("samples", "real", "frechet"))
    report = evaluate(
        samples,
        dataset,
        labels=labels,
        seed=args.seed,
        classifier_steps=args.classifier_steps,
        device=choose_device(args.device),
    )
    report["samples"]["file"], report["real"]["data"] = str(args.samples), str(args.data)
    if args.out:  # before anything can go wrong with printing
        write_report(args.out, report)
    print(format_report(report))
    return 0

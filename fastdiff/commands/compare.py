"""``fastdiff compare``: which sampling method and spacing serves a checkpoint's network best.

Each outcome stands in compare.json as soon as it is there; the same command again goes on.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.commands import networks
from fastdiff.commands.checkpoint_options import (
    add_checkpoint_arguments,
    describe,
    fingerprint,
    load_checkpoint,
    writable_folder,
)
from fastdiff.commands.data_options import KINDS_OF_DATA, add_reading_arguments
from fastdiff.commands.network_data import network_dataset
from fastdiff.commands.numbers import check_least
from fastdiff.errors import InputError
from fastdiff.evaluation.scores import FrechetRatio
from fastdiff.experiments.comparison import (
    Comparison,
    Outcome,
    cases,
    every_outcome,
    markdown,
    plot,
)
from fastdiff.files import replace_text
from fastdiff.methods.registry import METHODS
from fastdiff.optional import require
from fastdiff.process.respacing import SPACINGS
from fastdiff.sampling.sampler import Sampler

RECORD = "compare.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--data",
        metavar="SPEC",
        help=f"real images for Fréchet ratios (without: errors alone): {KINDS_OF_DATA}",
    )
    add_reading_arguments(parser)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="compare.json, compare.md and compare.png"
    )
    parser.add_argument("--calls", default="5,10,20,50", metavar="LIST", help="network calls")
    parser.add_argument(
        "--methods", default=",".join(METHODS), metavar="LIST", help="of fastdiff sample --method"
    )
    parser.add_argument(
        "--spacings", default="uniform,trailing,logsnr,beta", metavar="LIST", help="of --spacing"
    )
    parser.add_argument("--num", type=int, default=500, help="samples of a Fréchet ratio")
    parser.add_argument("--paths", type=int, default=64, help="samples of an error")
    parser.add_argument("--batch-size", type=int, default=250, help="samples drawn together")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and the classifier")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the network"
    )


def run(args: argparse.Namespace) -> int:
    check_least(args, 2, "num")
    check_least(args, 1, "paths", "batch_size")
    wanted = cases(
        _names(args.methods, "methods", METHODS),
        _names(args.spacings, "spacings", SPACINGS),
        _counts(args.calls),
    )
    checkpoint = load_checkpoint(args.checkpoint, args.weights, getattr(args, "device", None))
    out = writable_folder(args.out)
    settings = _settings(args, checkpoint)
    found = {outcome.case: outcome for outcome in _recorded(out / RECORD, settings)}
    print(describe(checkpoint, args.weights))
    comparison = _comparison(args, checkpoint)
    left = [case for case in wanted if case not in found]
    bar = require("tqdm", "train").tqdm(total=sum(case.calls for case in left), unit="call")
    for case in left:
        bar.set_description(f"{case.method}, {case.spacing}, {case.calls}")
        outcome = comparison.outcome(case)
        if outcome is not None:
            found[case] = outcome
            replace_text(out / RECORD, _record_of(settings, found.values()))
        bar.update(case.calls)
    bar.close()
    shown = [found[case] for case in wanted if case in found]
    text = markdown(shown)
    replace_text(out / "compare.md", f"{text}\n{every_outcome(shown)}")
    plot(out / "compare.png", shown, Path(args.checkpoint).resolve().name)
    print(f"\n{text}\n{out / 'compare.png'}")
    return 0


def _comparison(args: argparse.Namespace, checkpoint: Checkpoint) -> Comparison:
    frechet = None
    if args.data is not None:
        dataset = network_dataset(args, checkpoint, "a Fréchet ratio", labelled=False)
        frechet = FrechetRatio(dataset, seed=args.seed)
    sampler = Sampler(
        checkpoint.model,
        checkpoint.diffusion,
        dtype=torch.bfloat16 if args.dtype == "bfloat16" else None,
        self_condition=networks.self_condition(checkpoint),
    )
    classes = networks.num_classes(checkpoint)

    def kwargs(first: int, count: int) -> Mapping[str, Any]:
        if classes is None:
            return {}
        labels = torch.arange(first, first + count) % classes  # in turn
        device = next(checkpoint.model.parameters()).device
        return networks.labelled(checkpoint, labels.to(device))

    return Comparison(
        sampler,
        networks.image_shape(checkpoint),
        num=args.num,
        paths=args.paths,
        batch_size=args.batch_size,
        seed=args.seed,
        kwargs=kwargs,
        frechet=frechet,
    )


def _settings(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """What decides an outcome beside its case."""
    names = ("data", "num", "paths", "seed", "dtype")
    return {"network": fingerprint(checkpoint)} | {name: getattr(args, name) for name in names}


def _record_of(settings: dict[str, Any], outcomes: Iterable[Outcome]) -> str:
    """JSON with a line for each outcome."""
    lines = ",\n".join(f"  {json.dumps(asdict(outcome))}" for outcome in outcomes)
    return f'{{\n "settings": {json.dumps(settings)},\n "outcomes": [\n{lines}\n ]\n}}\n'


def _recorded(record: Path, settings: dict[str, Any]) -> list[Outcome]:
    """What was found before. InputError where it was by other settings."""
    if not record.is_file():
        return []
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        outcomes = [Outcome(**outcome) for outcome in found["outcomes"]]
        before = dict(found["settings"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{record} is damaged: give another --out") from None
    for name, value in settings.items():
        if before.get(name) != value:
            raise InputError(
                f"{record} is of {name} {before.get(name)!r}, and now it is {value!r}: give "
                "another --out, or the same command"
            )
    return outcomes


def _names(text: str, option: str, known: Any) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise InputError(f"--{option} has {name!r}; expected of {', '.join(known)}")
    if not names:
        raise InputError(f"--{option} is empty; expected of {', '.join(known)}")
    return list(dict.fromkeys(names))


def _counts(text: str) -> list[int]:
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise InputError(f"--calls is {text!r}; expected numbers of network calls, such as 5,10,20")
    return counts

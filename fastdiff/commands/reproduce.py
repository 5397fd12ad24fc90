"""``fastdiff reproduce``: an experiment of a paper, planned, done in stages, set beside the paper.

A stage is a command of fastdiff with its own restart. Those that are finished stand in the file
experiment.json of the folder, and are not done again.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from fastdiff.checks import choose_device
from fastdiff.commands.checkpoint_options import new_directory, writable_folder
from fastdiff.commands.data_options import KINDS_OF_DATA, add_reading_arguments
from fastdiff.commands.numbers import check_least
from fastdiff.commands.output import said_once
from fastdiff.commands.reproduce_rates import measured
from fastdiff.commands.reproduce_report import report
from fastdiff.commands.reproduce_request import Request, parsed, read_request
from fastdiff.commands.reproduce_stages import Stages
from fastdiff.errors import InputError
from fastdiff.evaluation.features import NETWORKS, feature_network
from fastdiff.experiments.plan import Stage, plan_text
from fastdiff.experiments.table import EXPERIMENTS
from fastdiff.files import replace_text
from fastdiff.ranks import join

RECORD = "experiment.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(EXPERIMENTS)}")
    parser.add_argument(
        "--data", required=True, metavar="SPEC", help=f"what it is trained on: {KINDS_OF_DATA}"
    )
    parser.add_argument(
        "--eval-data", metavar="SPEC", help="images for bits/dim (without: those of --data)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where everything goes")
    parser.add_argument("--plan", action="store_true", help="print the plan, and do nothing")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        metavar="S",
        help="make it small: iterations, samples and images scored times S, the batch size times "
        "its square root, the network's width and the steps times its fourth root",
    )
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="a checkpoint of its network, in place of training"
    )
    parser.add_argument("--learned", metavar="DIR", help="of figure-8: with a learned variance")
    parser.add_argument("--fixed", metavar="DIR", help="of figure-8: with a fixed variance")
    parser.add_argument(
        "--image-size", type=int, help="resize and crop pictures to the experiment's side"
    )
    add_reading_arguments(parser)
    parser.add_argument(
        "--features", choices=NETWORKS, default="inception", help="the network scores rest on"
    )
    parser.add_argument(
        "--feature-weights",
        metavar="PATH",
        help="that network's, if it brings none",
    )
    parser.add_argument(
        "--train-flags",
        default="",
        metavar="FLAGS",
        help="more flags of `fastdiff train`, in one word: --train-flags='--microbatch 32'",
    )
    parser.add_argument(
        "--sample-flags", default="", metavar="FLAGS", help="more flags of `fastdiff sample`"
    )
    parser.add_argument(
        "--machines",
        type=int,
        default=8,
        metavar="N",
        help="the plan's times are for 1 to N GPUs, or machines without one",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (without: cuda if there is one)")


def run(args: argparse.Namespace) -> int:
    ranks = join(args.device)
    with ranks.heard(), said_once(ranks):
        stages, request, done = ranks.together(lambda: _prepare(args, ranks.device))
        left = [stage for stage in stages.stages if stage.name not in done]
        ranks.agree({"stages": [stage.name for stage in left]})
        ranks.on_first(lambda: _plan(args, stages, done, ranks.device))
        if not args.plan:
            ranks.on_first(lambda: _begin(request, done))
        ranks.leave()  # each stage meets again
        for stage in [] if args.plan else left:
            print(f"\n== {stage.name}: fastdiff {shlex.join(stage.words)}", flush=True)
            _do(stage)
            done.append(stage.name)
            if ranks.rank == 0:
                _record(request, done)
        if not args.plan and ranks.rank == 0:
            print(f"\n{report(request, stages)}")
    return 0


def _prepare(args: argparse.Namespace, device: str | None) -> tuple[Stages, Request, list[str]]:
    """What is to be done, and the names of what is. InputError before anything is."""
    check_least(args, 1, "machines")
    request = read_request(args)
    network = feature_network(args.features, args.feature_weights, choose_device(device))
    words = ["--features", args.features]
    words += [] if args.feature_weights is None else ["--feature-weights", args.feature_weights]
    stages = Stages(request, network, tuple(words))
    for stage in stages.stages:
        parsed(stage.words[0], stage.words[1:])
    return stages, request, _finished(request)


def _finished(request: Request) -> list[str]:
    """The stages that are done. InputError where --out is another experiment's, or no one's."""
    record = request.out / RECORD
    if not record.is_file():
        new_directory(str(request.out))
        return []
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        settings, finished = found["settings"], [str(name) for name in found["finished"]]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{record} is damaged: give another --out") from None
    wanted = json.loads(json.dumps(request.settings))
    for name in {**wanted, **settings}:
        if settings.get(name) != wanted.get(name):
            raise InputError(
                f"--out {request.out} was begun with {name} {settings.get(name)!r}, and now it is "
                f"{wanted.get(name)!r}: give another --out, or the same command"
            )
    return finished


def _plan(
    args: argparse.Namespace, stages: Stages, done: Sequence[str], device: str | None
) -> None:
    chosen = choose_device(device)
    left = [stage for stage in stages.stages if stage.name not in done]
    rates = measured(stages, left, chosen)
    kind = "GPU" if chosen.type == "cuda" else "machine"
    experiment = stages.request.experiment
    print(f"{experiment.name}: {experiment.source}; data: {experiment.data}")
    print(
        plan_text(stages.stages, done, rates, most=args.machines, machine=f"this {kind}"),
        flush=True,
    )


def _begin(request: Request, done: Sequence[str]) -> None:
    writable_folder(request.out)
    _record(request, done)


def _do(stage: Stage) -> None:
    """The command, as if it had been typed."""
    command, *words = stage.words
    module: Any = import_module(f"fastdiff.commands.{command}")
    module.run(parsed(command, tuple(words)))


def _record(request: Request, done: Sequence[str]) -> None:
    document = {"settings": request.settings, "finished": list(done)}
    text = json.dumps(document, indent=2) + "\n"
    replace_text(Path(request.out) / RECORD, text, durable=True)

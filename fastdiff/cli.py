"""The ``fastdiff`` command: finds the subcommand, runs it, and turns bad input into one line."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from fastdiff import __version__
from fastdiff.errors import InputError, TrainingError

COMMANDS = {
    "train": "train a diffusion model on images",
    "sample": "draw images from a checkpoint",
    "interpolate": "pictures of what lies between two images: by shared noise, or by DDIM",
    "nll": "score a checkpoint: bits per dimension of images, with its terms",
    "rate-distortion": "progressive lossy coding by a checkpoint: bits against error, pictured",
    "evaluate": "score samples against real images: recognition, class shares, Fréchet, memorising",
    "timesteps": "search the timesteps at which few steps come nearest to many, for a checkpoint",
    "compare": "sampling methods and spacings on a checkpoint: error and Fréchet over calls",
    "reproduce": "an experiment of a paper: planned, trained, sampled, scored, beside its figures",
    "convert": "turn a published .pt checkpoint into one that describes itself",
    "average": "make an average of the weights, of any width, of a run's snapshots",
    "bench": "time the fused operations against eager PyTorch on this machine",
    "info": "print versions, devices, instruction sets and what was compiled for what",
}
# These may be started as one of several processes: they share their work, or have none to do.
SHARING = ("train", "sample", "nll", "rate-distortion", "evaluate", "reproduce", "info")


def build_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser for ``argv`` (None: for any). Of the commands it loads those named there alone,
    and torch with them."""
    parser = argparse.ArgumentParser(
        prog="fastdiff", description="Train, sample and score DDPM-family diffusion models."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        if argv is None or name in argv:
            module = importlib.import_module(module_of(name))
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def module_of(command: str) -> str:
    """The module of a subcommand."""
    return f"fastdiff.commands.{command.replace('-', '_')}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Exit codes: 0 done, 2 bad input or a broken run, 130 Ctrl-C."""
    from fastdiff.commands.output import safe_output

    try:
        with safe_output():
            return _run(argv)
    except OSError as error:  # of standard output: the command is done
        print(f"fastdiff: error: {error}", file=sys.stderr)
        return 2


def _run(argv: Sequence[str] | None) -> int:
    given = sys.argv[1:] if argv is None else argv
    args = build_parser(given).parse_args(given)

    from torch import OutOfMemoryError

    from fastdiff.ranks import refuse_several

    try:
        if args.command not in SHARING:
            refuse_several()
        return args.run(args)
    except (InputError, TrainingError, OSError, MemoryError, OutOfMemoryError) as error:
        if os.environ.get("FASTDIFF_TRACEBACK") == "1":
            raise
        print(f"fastdiff {args.command}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastdiff {args.command}: interrupted", file=sys.stderr)
        return 130


def _one_line(error: BaseException) -> str:
    """The message, with what was noted of it on its way."""
    silent = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
    text = str(error) or silent
    return " ".join("; ".join([text, *getattr(error, "__notes__", [])]).split())


if __name__ == "__main__":
    sys.exit(main())

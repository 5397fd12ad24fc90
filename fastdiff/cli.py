"""The ``fastdiff`` command: finds the subcommand, runs it, and turns bad input into one line."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from fastdiff.errors import InputError, TrainingError

COMMANDS = ("train", "sample", "nll", "evaluate", "convert", "bench", "info")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastdiff", description="Train, sample and score DDPM-family diffusion models."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"fastdiff.commands.{name}")
        subparser = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Exit codes: 0 done, 2 bad input or a broken run, 130 Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (InputError, TrainingError, OSError) as error:
        if os.environ.get("FASTDIFF_TRACEBACK") == "1":
            raise
        message = " ".join(str(error).split())
        print(f"fastdiff {args.command}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastdiff {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

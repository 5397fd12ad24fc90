"""By which method a checkpoint is sampled, and how much of its network each step runs."""

import argparse
from typing import Any

from fastdiff.commands.named_values import named_values
from fastdiff.methods.registry import METHODS, find
from fastdiff.sampling.settings import AUTO

# Of the options below those that have no default of their own.
OPTIONAL = ("eta", "method_option", "reuse")


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method",
        choices=(*METHODS, AUTO),
        default="ddpm",
        metavar="NAME",
        help=f"{', '.join(METHODS)}, or auto: that with the least measured error by so many steps, "
        "and with it the spacing, unless there is one",
    )
    parser.add_argument(
        "--eta",
        type=float,
        default=argparse.SUPPRESS,
        help="the share of noise, of methods that have one: of ddim 0 is deterministic and 1 as "
        "noisy as ddpm (default: the method's own)",
    )
    add_method_option(parser)
    parser.add_argument(
        "--reuse",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="run the whole U-Net at every Nth step, and its shallow layers between, on the deep "
        "features that were kept (default: all of it at every step)",
    )


def add_method_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method-option",
        action="append",
        default=argparse.SUPPRESS,
        metavar="NAME=VALUE",
        help="of the method, such as order=2 of unipc or s_churn=40 of heun; may be given several "
        "times (docs/methods.md has each method's)",
    )


def method_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Sampler's of these options. InputError for options that are none of the method's."""
    for name in OPTIONAL:
        vars(args).setdefault(name, None)
    return {
        "method": args.method,
        "eta": args.eta,
        "method_options": named_method_options(args.method, args.method_option),
        "reuse": args.reuse,
    }


def named_method_options(method: str, given: list[str] | None) -> dict[str, Any] | None:
    """--method-option as Sampler has it. InputError for what is no option of the method's."""
    known = [] if method == AUTO else [name for name in find(method).options if name != "eta"]
    return named_values("--method-option", given or [], f"--method {method}", known)

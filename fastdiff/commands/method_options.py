"""By which method a checkpoint is sampled, and how much of its network each step runs."""

import argparse
import ast
from typing import Any

from fastdiff.errors import InputError
from fastdiff.methods.registry import METHODS, find

# Of the options below those that have no default of their own.
OPTIONAL = ("eta", "method_option", "reuse", "guidance_reuse")


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method", choices=METHODS, default="ddpm", metavar="NAME", help=", ".join(METHODS)
    )
    parser.add_argument(
        "--eta",
        type=float,
        default=argparse.SUPPRESS,
        help="the share of noise, of methods that have one: of ddim 0 is deterministic and 1 as "
        "noisy as ddpm (default: the method's own)",
    )
    parser.add_argument(
        "--method-option",
        action="append",
        default=argparse.SUPPRESS,
        metavar="NAME=VALUE",
        help="of the method, such as order=2 of unipc or s_churn=40 of heun; may be given several "
        "times (fastdiff/methods has each method's)",
    )
    parser.add_argument(
        "--reuse",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="run the whole U-Net at every Nth step, and its shallow layers between, on the deep "
        "features that were kept (default: all of it at every step)",
    )
    parser.add_argument(
        "--guidance-reuse",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="of guidance: run the unconditional half at every Nth step (default: at every step)",
    )


def method_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Sampler's of these options. InputError for options that are none of the method's."""
    for name in OPTIONAL:
        vars(args).setdefault(name, None)
    return {
        "method": args.method,
        "eta": args.eta,
        "method_options": _named(args.method, args.method_option or []),
        "reuse": args.reuse,
    }


def _named(method: str, given: list[str]) -> dict[str, Any] | None:
    known = [name for name in find(method).options if name != "eta"]
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            options = ", ".join(f"{known_name}=…" for known_name in known) or "none that there is"
            raise InputError(f"--method-option is {text!r}; of --method {method} is {options}")
        found[name] = _value(value)
    return found or None


def _value(text: str) -> Any:
    """A number, a list or True, as Python writes them; else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text

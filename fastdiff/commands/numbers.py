"""Numbers among the options, as every command checks them."""

import argparse

from fastdiff.errors import InputError


def check_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """InputError where an option of those that were given (not None) is less than that."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} is {value}; expected {least} or more")

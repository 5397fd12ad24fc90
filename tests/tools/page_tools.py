"""What the README and the pages in docs/ show: their fenced blocks, run and parsed."""

import shlex

from fastdiff.cli import build_parser
from paths import ROOT


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language ("" for those that name none)."""
    fenced = (ROOT / page).read_text().split("```")[1::2]
    return [text for first, _, text in (b.partition("\n") for b in fenced) if first == language]


def run(page: str, example: str, **names: object) -> dict:
    """The names after an example has run among these."""
    exec(compile(example, page, "exec"), names)
    return names


def parse_commands(page: str) -> int:
    """How many commands of fastdiff stand in the page; argparse has taken all of them."""
    words = [shlex.split(line) for block in blocks(page, "") for line in block.splitlines()]
    commands = [line for line in words if line[:1] in (["fastdiff"], ["torchrun"])]
    for command in commands:
        build_parser().parse_args(command[command.index("fastdiff") + 1 :])
    return len(commands)

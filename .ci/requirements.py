"""What pyproject.toml requires, a line each: to build (no argument), or for an extra.

python .ci/requirements.py [EXTRA]
"""

import re
import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())


def of_extra(name: str) -> list[str]:
    """Its requirements, those of the extras that it names in place of their names."""
    found = []
    for line in PROJECT["project"]["optional-dependencies"][name]:
        ours = re.fullmatch(r"fastdiff\[(.+)\]", line)
        found += sum(map(of_extra, ours[1].split(",")), []) if ours else [line]
    return found


if __name__ == "__main__":
    extra = sys.argv[1:]
    lines = PROJECT["project"]["dependencies"] + of_extra(*extra) if extra else None
    print(*(lines or PROJECT["build-system"]["requires"]), sep="\n")

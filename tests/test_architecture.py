"""docs/architecture.md is true of the code: imports go down its floors only."""

import ast
import re
from pathlib import Path

import pytest

from paths import ROOT

PACKAGE = ROOT / "fastdiff"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
FLOORS = {
    folder: int(number)
    for number, folders in re.findall(r"^\| (\d) \| (.+?) \|", PAGE, flags=re.MULTILINE)
    for folder in re.findall(r"`(\w+)/`", folders)
}
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def imported(file: Path) -> set[str]:
    """The names after ``fastdiff.`` of what a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("fastdiff.")}
    return found


def test_the_table_has_every_folder_on_one_floor():
    assert sorted(FLOORS) == FOLDERS


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_down(folder):
    files = [f for f in (PACKAGE / folder).rglob("*.py")]
    assert files
    for file in files:
        for other in imported(file) & set(FOLDERS) - {folder}:
            assert FLOORS[other] < FLOORS[folder], f"{file.relative_to(ROOT)} imports {other}"


def test_what_lies_on_the_ground_knows_no_folder():
    above = {"__init__", "__main__", "cli", "public"}
    for file in PACKAGE.glob("*.py"):
        if file.stem not in above:
            assert not imported(file) & set(FOLDERS), file.name


def test_no_import_is_relative():
    assert all(
        not re.search(r"^\s*from \.", file.read_text(), flags=re.MULTILINE)
        for file in PACKAGE.rglob("*.py")
    )

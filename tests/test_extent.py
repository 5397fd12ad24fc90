"""Long tests are not alone: make test has a shorter one beside each (pyproject.toml's markers)."""

import ast
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

import extent
from paths import ROOT

FILES = sorted((ROOT / "tests").rglob("test_*.py"))


def is_long(node: ast.expr) -> bool:
    """pytest.mark.long"""
    return ast.unparse(node) == "pytest.mark.long"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_long_test_has_a_shorter_one_in_its_file(path):
    body = ast.parse(path.read_text()).body
    tests = [f for f in body if isinstance(f, ast.FunctionDef) and f.name.startswith("test_")]
    short = [test for test in tests if not any(map(is_long, test.decorator_list))]
    assert short, f"every test of {path.name} is long"
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            assert not any(map(is_long, ast.walk(node.value))), "mark the tests, not the file"


@dataclass(eq=False)
class Item:
    nodeid: str
    marks: dict = field(default_factory=dict)
    path: Path = Path("test_a.py")

    def get_closest_marker(self, name):
        return self.marks.get(name)


def cases(name, count, **marks):
    return [Item(f"test_a.py::{name}[{i}]", marks) for i in range(count)]


SAMPLE = SimpleNamespace(args=(3,))
ITEMS = [
    *cases("test_plain", 4),
    *cases("test_sampled", 9, sample=SAMPLE),
    *cases("test_unhurried", 2, seconds=True),
    *cases("test_long", 2, long=True),
]


def counts(items, **options):
    names = [extent.function(item)[11:] for item in extent.chosen(items, **options)]
    return {name: names.count(name) for name in names}


def test_what_a_run_takes():
    plain = {"test_plain": 4, "test_sampled": 3, "test_unhurried": 2}
    assert counts(ITEMS, quick=False, everything=False) == plain
    assert counts(ITEMS, quick=True, everything=False) == {"test_plain": 1, "test_sampled": 1}
    everything = {"test_plain": 4, "test_sampled": 9, "test_unhurried": 2, "test_long": 2}
    assert counts(ITEMS, quick=False, everything=True) == everything
    assert counts(ITEMS[12:13], quick=False, everything=False) == {"test_sampled": 1}  # named


def test_files_with_long_tests_come_first():
    other = Item("test_b.py::test", {"long": True}, Path("test_b.py"))
    assert extent.ordered([*ITEMS[:4], other])[0] is other


def test_a_busy_machine_fails_no_drawn_example():
    hypothesis = pytest.importorskip("hypothesis")
    chosen = hypothesis.settings()
    assert chosen.deadline is None
    assert hypothesis.HealthCheck.too_slow in chosen.suppress_health_check

"""Every method, and every option that one has, is named in docs/methods.md; spacings likewise."""

import re
from pathlib import Path

import pytest

from fastdiff.methods.registry import METHODS
from fastdiff.process.respacing import SPACINGS
from fastdiff.process.spacings import spacing_options

PAGE = (Path(__file__).parents[2] / "docs/methods.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([^`\s=]+)`", PAGE))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_and_its_options_are_documented(method):
    assert {method.name, *method.options} <= NAMED


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_spacing_and_its_options_are_documented(spacing):
    assert {spacing, *spacing_options(spacing)} <= NAMED

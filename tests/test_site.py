"""The site: mkdocs.yml names what exists, the reference has every public name, and it builds."""

import inspect
import re
import subprocess
import sys
import tomllib
from pkgutil import resolve_name

import pytest

from paths import ROOT

DOCS = ROOT / "docs"
CONFIG = (ROOT / "mkdocs.yml").read_text()
REFERENCE = sorted((DOCS / "reference").glob("*.md"))
SHOWN = [
    name
    for page in REFERENCE
    for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)
]
PUBLIC = ["fastdiff", "fastdiff.ops", "fastdiff.training", "fastdiff.data", "fastdiff.evaluation"]
GENERATED = dict(  # a file and the page that is made of it
    re.findall(r'"(\S+\.md)": "(\S+\.md)"', (DOCS / "generated_pages.py").read_text())
)


def test_the_navigation_has_every_page_once():
    pages = re.findall(r"^ +- (?:.+: )?(\S+\.md)$", CONFIG, flags=re.MULTILINE)
    written = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")}
    assert sorted(pages) == sorted(written | set(GENERATED.values()))


def test_the_files_that_the_configuration_names_exist():
    assert "README.md" in GENERATED and all((ROOT / file).exists() for file in GENERATED)
    named = re.findall(r"\[(docs/\S+\.py)\]", CONFIG)
    assert len(named) == 2
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_pages_link_to_files_and_headings_that_exist():
    links = 0
    for page in DOCS.rglob("*.md"):
        for target, heading in re.findall(r"\]\((?!\w+:)([^)#]*)(#[^)]*)?\)", page.read_text()):
            file = (page.parent / target).resolve() if target else page
            assert file.exists(), f"{page.name}: {target}"
            if heading:
                words = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
                assert heading[1:] in {re.sub(r"\W+", "-", w.lower()) for w in words}, heading
            links += 1
    assert links >= 10


def test_what_the_reference_shows_exists():
    assert len(SHOWN) > 40
    for name in SHOWN:
        if name.startswith("fastdiff.integrations.diffusers"):
            pytest.importorskip("diffusers")
        resolve_name(name)


def test_the_reference_shows_every_public_name():
    shown = [resolve_name(name) for name in SHOWN if "diffusers" not in name]
    for module in map(resolve_name, PUBLIC):
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value):
                assert any(value is other for other in shown), f"{module.__name__}.{name}"


def test_the_reference_names_arguments_one_by_one():
    """The site's builder refuses "a, b: …", which is no argument's name."""
    for value in map(resolve_name, (name for name in SHOWN if "diffusers" not in name)):
        members = vars(value).values() if isinstance(value, type) else ()
        for documented in (value, *members):
            doc = inspect.getdoc(documented) or ""
            section = re.search(r"^Args:\n((?:[ ].*\n|\n)*)", doc + "\n", flags=re.MULTILINE)
            together = re.findall(r"^ {4}(\w+, .*?):", section[1] if section else "", re.MULTILINE)
            assert not together, f"{documented}: {together}"


@pytest.mark.long
def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {p.parent.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("index.html")}
    assert {"architecture", "reference/ops", "reference/command_line"} <= pages
    ops = (tmp_path / "reference/ops/index.html").read_text()
    assert "fastdiff.ops.group_norm_silu" in ops and "FiLM" in ops
    for name in ("first_sample", "uncond_kwargs"):  # of Sampler.sample, with all its arguments
        assert re.search(
            rf">{name}</span>", (tmp_path / "reference/sampling/index.html").read_text()
        )
    assert "--preset" in (tmp_path / "reference/command_line/index.html").read_text()


def test_the_extra_docs_is_what_the_site_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = " ".join(project["optional-dependencies"]["docs"])
    assert "mkdocs" in extra and "mkdocstrings[python]" in extra

"""What the site shows that stands elsewhere: the README and its like, the command line's help.

mkdocs calls the ``on_`` functions (mkdocs.yml names this file).
"""

import dataclasses
import os
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).parent.parent
PAGES = {  # files to pages of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "studies.md",
}
WIDTH = "90"  # columns of the help
STYLE = """
.wy-nav-content { max-width: 62em; }
.rst-content table { margin-bottom: 1.5em; }
.rst-content table td, .rst-content table th { padding: 4px 8px; line-height: 1.4; }
.wy-table-responsive table td, .wy-table-responsive table th { white-space: normal; }
.doc-contents { padding-left: 1.5em; border-left: 2px solid #e1e4e5; }
.doc-contents table th { vertical-align: top; }
.rst-content pre { padding: 0.8em; }
.rst-content pre code { padding: 0; border: none; background: none; }
"""


def on_files(files: Any, config: Any) -> Any:
    for source, page in PAGES.items():
        text = links_from(ROOT / source, (ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    colours = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    files.append(File.generated(config, "site.css", content=f"{colours}\n{STYLE}"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    if page.file.src_uri == "reference/command_line.md":
        return f"{markdown}\n{command_line()}"
    if page.file.src_uri == "reference/training.md":
        return markdown.replace("<!-- settings -->", settings())
    return markdown


def links_from(source: Path, text: str) -> str:
    """The text of a page of the site: what it links to is named from docs/ on."""

    def moved(match: re.Match[str]) -> str:
        target = (source.parent / match[1]).resolve().relative_to(ROOT).as_posix()
        return f"]({PAGES.get(target) or target.removeprefix('docs/')}{match[2]})"

    return re.sub(r"\]\((?!\w+:|#)([^)#]+)((?:#[^)]*)?)\)", moved, text)


def command_line() -> str:
    """The help of every subcommand."""
    from fastdiff import cli

    os.environ["COLUMNS"] = WIDTH
    sections = []
    for command in cli.COMMANDS:
        with redirect_stdout(StringIO()) as shown:
            try:
                cli.build_parser().parse_args([command, "--help"])
            except SystemExit:  # argparse's end of a help
                pass
        sections.append(f"## fastdiff {command}\n\n```text\n{shown.getvalue()}```\n")
    return "\n".join(sections)


def settings() -> str:
    """The fields of TrainConfig as a table."""
    from fastdiff.training import TrainConfig

    lines = ["| setting | default | what | fixed |", "|---|---|---|---|"]
    for field in dataclasses.fields(TrainConfig):
        about = field.metadata
        choices = f" ({', '.join(about['choices'])})" if about["choices"] else ""
        fixed = "fixed" if about["fixed"] else ""
        lines.append(
            f"| `{field.name}` | `{field.default!r}` | {about['help']}{choices} | {fixed} |"
        )
    return "\n".join(lines)

"""What came out of an experiment, beside what the paper reports."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdiff.files import replacing
from fastdiff.optional import require

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito


def comparison(rows: Sequence[tuple[str, str, float | None, float]]) -> str:
    """Rows (what was sampled, score, the paper's figure if any, ours) for a terminal."""
    first = max(len(name) for name, *_ in rows) + 2
    second = max(len(score) for _, score, *_ in rows) + 2
    lines = [f"{'':{first}}{'':{second}}{'paper':>8}{'here':>11}"]
    for name, score, paper, ours in rows:
        said = "-" if paper is None else f"{paper:g}"
        lines.append(f"{name:{first}}{score:{second}}{said:>8}{ours:11.5g}")
    return "\n".join(lines)


def plot_curves(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    x: str,
    ys: Sequence[str],
    labels: Mapping[str, str],
    title: str,
) -> None:
    """A PNG with a panel for each of ``ys`` over ``x``, a curve for each ``curve`` of the rows.
    labels: of the axes, by those names."""
    figure = require("matplotlib.figure", "demo").Figure(
        figsize=(6 * len(ys), 4.5), layout="constrained"
    )
    for panel, y in enumerate(ys):
        axes = figure.add_subplot(1, len(ys), panel + 1)
        for number, curve in enumerate(dict.fromkeys(row["curve"] for row in rows)):
            mine = [row for row in rows if row["curve"] == curve]
            axes.plot(
                [row[x] for row in mine],
                [row[y] for row in mine],
                "o-",
                color=COLOURS[number % len(COLOURS)],
                label=curve,
            )
        axes.set_xscale("log")
        axes.set_yscale("log" if y == "fid" else "linear")
        axes.set_xlabel(labels[x])
        axes.set_ylabel(labels[y])
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.suptitle(title)
    with replacing(path) as stream:
        figure.savefig(stream, format="png", dpi=120)

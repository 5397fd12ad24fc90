"""Sampling methods and spacings of steps on one network, over the number of network calls.

Methods that draw no noise after x_T solve an ordinary differential equation: their error is the
root mean square distance, in units of [−1, 1], of their samples from those that DPM-Solver++(2M)
makes of the same x_T by all steps of the process. What the samples are worth says, for all methods,
their Fréchet ratio to real images (``fastdiff.evaluation.scores.FrechetRatio``).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.files import replacing
from fastdiff.images import to_bytes
from fastdiff.methods.protocol import noise_levels
from fastdiff.optional import require
from fastdiff.sampling.sampler import Sampler

SOLUTION = "dpmsolver++"
MARKERS = "os^vDP*X"


@dataclass(frozen=True)
class Case:
    """A method with a spacing, in at most ``calls`` network calls."""

    method: str
    spacing: str
    calls: int


@dataclass(frozen=True)
class Outcome(Case):
    """What a case came to: how many steps it took, and its error (None where it draws noise) and
    Fréchet ratio (None without real images)."""

    steps: int
    error: float | None
    frechet: float | None

    @property
    def case(self) -> Case:
        return Case(self.method, self.spacing, self.calls)


class Comparison:
    """Draws samples of one network by each case, and judges them.

    Args:
        sampler: of the process, with everything but steps, spacing and method as it shall be.
        shape: (C, H, W) of a sample.
        num, paths: how many samples are drawn for a Fréchet ratio, and for an error alone.
        batch_size: how many at a time.
        kwargs: of the network for samples first … first + count − 1.
        frechet: the ratio of uint8 samples (N, H, W, C); None: there is nothing to compare with.
    """

    def __init__(
        self,
        sampler: Sampler,
        shape: tuple[int, ...],
        *,
        num: int,
        paths: int,
        batch_size: int,
        seed: int,
        kwargs: Callable[[int, int], Mapping[str, Any]],
        frechet: Callable[[Any], float] | None,
    ) -> None:
        self.sampler, self.shape, self.frechet = sampler, shape, frechet
        self.num, self.paths = (paths if frechet is None else num), paths
        self.batch_size, self.seed, self.kwargs = batch_size, seed, kwargs
        self._solution: Tensor | None = None

    def outcome(self, case: Case) -> Outcome | None:
        """Of a case; None where so few calls are less than a step of the method, where its steps
        begin with what is mostly data, and where the process has no such levels."""
        steps = self._steps(case)
        if steps is None:
            return None
        signal, noise = noise_levels(self.sampler.diffusion)
        if signal[-1] > noise[-1]:
            return None
        noisy = self.sampler.table.is_noisy
        if noisy and self.frechet is None:
            return Outcome(**asdict(case), steps=steps, error=None, frechet=None)
        samples = self._draw(self.num)
        error = None
        if not noisy:
            difference = samples[: self.paths] - self.solution()[: len(samples)]
            error = difference.square().mean().sqrt().item()
        frechet = None if self.frechet is None else self.frechet(to_bytes(samples))
        return Outcome(**asdict(case), steps=steps, error=error, frechet=frechet)

    def solution(self) -> Tensor:
        """(paths, C, H, W): where the first samples' x_T lead to."""
        if self._solution is None:
            self.sampler.configure(steps=None, spacing="uniform", method=SOLUTION)
            self._solution = self._draw(self.paths)
        return self._solution

    def _steps(self, case: Case) -> int | None:
        """The most steps that take no more than the case's calls; the sampler is set to them. None
        where there are no such steps, or the process has no levels for the method or spacing."""
        least, most = 0, min(case.calls, self.sampler.process.num_timesteps)
        while least < most:
            steps = (least + most + 1) // 2
            try:
                self._configure(case, steps)
            except InputError:
                return None
            fits = len(self.sampler.table) <= case.calls
            least, most = (steps, most) if fits else (least, steps - 1)
        if least:
            self._configure(case, least)
        return least or None

    def _configure(self, case: Case, steps: int) -> None:
        self.sampler.configure(steps=steps, spacing=case.spacing, method=case.method)

    def _draw(self, count: int) -> Tensor:
        parts = []
        for first in range(0, count, self.batch_size):
            size = min(self.batch_size, count - first)
            given: dict[str, Any] = {"seed": self.seed, "first_sample": first}
            kwargs = self.kwargs(first, size)
            parts.append(self.sampler.sample((size, *self.shape), **given, model_kwargs=kwargs))
        return torch.cat(parts).cpu()


def cases(methods: Sequence[str], spacings: Sequence[str], calls: Sequence[int]) -> list[Case]:
    """All of them, the fewest calls first."""
    return [
        Case(method, spacing, count)
        for count in sorted(calls)
        for method in methods
        for spacing in spacings
    ]


def best(
    outcomes: Sequence[Outcome], score: str, of: str = "method"
) -> dict[tuple[str, int], Outcome]:
    """Of each method ("spacing": each spacing) and number of calls the outcome with the least
    ``score``, "error" or "frechet", over the spacings (the methods)."""
    found: dict[tuple[str, int], Outcome] = {}
    for outcome in outcomes:
        value, key = getattr(outcome, score), (getattr(outcome, of), outcome.calls)
        if value is not None and (key not in found or value < getattr(found[key], score)):
            found[key] = outcome
    return found


TITLES = {
    "error": "Root mean square error against the solution by all steps",
    "frechet": "Fréchet ratio to real images",
}


def markdown(outcomes: Sequence[Outcome]) -> str:
    """Two tables for each score: a row for each method, or each spacing, a column for each number
    of calls, in each the least score, and by which spacing, or method, that was; the least of a
    column is bold. InputError where no case had a score."""
    parts = [
        _table(outcomes, score, of)
        for score in TITLES
        for of in ("method", "spacing")
        if best(outcomes, score)
    ]
    if not parts:
        raise InputError("no case had a score: give --data, or methods that draw no noise")
    return "\n\n".join(parts) + "\n"


def _table(outcomes: Sequence[Outcome], score: str, of: str) -> str:
    found, by = best(outcomes, score, of), "spacing" if of == "method" else "method"
    calls = sorted({outcome.calls for outcome in outcomes})
    least = {
        count: min((getattr(o, score) for (_, n), o in found.items() if n == count), default=None)
        for count in calls
    }
    lines = [f"{TITLES[score]}, by network calls, the best {by} in each place:", ""]
    lines += _header(of, *map(str, calls))
    for name in dict.fromkeys(name for name, _ in found):
        cells = []
        for count in calls:
            outcome = found.get((name, count))
            text = _number(outcome, score)
            if outcome is not None:
                bold = getattr(outcome, score) == least[count]
                text = f"{'**' + text + '**' if bold else text} {getattr(outcome, by)}"
            cells.append(text)
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def every_outcome(outcomes: Sequence[Outcome]) -> str:
    """A table of all of them: a row for each method with each spacing, and in the column of a
    number of calls error and Fréchet ratio."""
    calls = sorted({outcome.calls for outcome in outcomes})
    known = {outcome.case: outcome for outcome in outcomes}
    lines = ["Error / Fréchet ratio of all, by network calls:", ""]
    lines += _header("method", "spacing", *map(str, calls))
    for method, spacing in dict.fromkeys((o.method, o.spacing) for o in outcomes):
        cells = []
        for count in calls:
            outcome = known.get(Case(method, spacing, count))
            cells.append(" / ".join(_number(outcome, score) for score in TITLES))
        lines.append(f"| `{method}` | `{spacing}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _header(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def _number(outcome: Outcome | None, score: str) -> str:
    value = None if outcome is None else getattr(outcome, score)
    return "–" if value is None else f"{value:.3g}"


def plot(path: Path, outcomes: Sequence[Outcome], title: str) -> None:
    """A PNG: each score over the calls, a line for each method by its best spacings."""
    figures = require("matplotlib.figure", "demo")
    found = {score: best(outcomes, score) for score in TITLES}
    shown = [score for score, of in found.items() if of]
    figure = figures.Figure(figsize=(6.5 * len(shown), 5), layout="constrained")
    methods = list(dict.fromkeys(outcome.method for outcome in outcomes))
    for number, score in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), number + 1)
        for i, method in enumerate(methods):
            mine = sorted(n for m, n in found[score] if m == method)
            if mine:
                axes.plot(
                    mine,
                    [getattr(found[score][method, n], score) for n in mine],
                    marker=MARKERS[i % len(MARKERS)],
                    color=f"C{i % 10}",
                    linestyle="-" if i < 10 else "--",
                    label=method,
                )
        axes.set(xscale="log", yscale="log", xlabel="network calls", ylabel=TITLES[score])
        if score == "frechet":  # what is far off would press the others together
            least = min(outcome.frechet or math.inf for outcome in found[score].values())
            axes.set_ylim(top=8 * least)
        calls = sorted({outcome.calls for outcome in outcomes})
        axes.set_xticks(calls, map(str, calls))
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small", ncols=2)
    figure.suptitle(title)
    with replacing(path) as stream:
        figure.savefig(stream, format="png", dpi=110)

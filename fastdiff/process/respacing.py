"""Strided subsequences of timesteps: published sections, other spacings, or a list.

Nichol & Dhariwal 2021 section 4; DDIM (Song et al. 2020); DPM-Solver (Lu et al. 2022,
arXiv:2206.00927). The spacings of noise levels between the steps stand in spacings.py.
"""

import operator
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastdiff.checks import is_finite
from fastdiff.errors import InputError
from fastdiff.methods.levels import Float64Array
from fastdiff.methods.protocol import Process
from fastdiff.process.between import Grid, Strided, log_snr
from fastdiff.process.spacings import LEVEL_SPACINGS, Span, check_options, spread
from fastdiff.process.tables import TimestepMap

STEP_SPACINGS = ("uniform", "quadratic", "trailing", "logsnr")
SPACINGS = (*STEP_SPACINGS, *LEVEL_SPACINGS)


def space_timesteps(num_timesteps: int, sections: str | int | Iterable[int]) -> list[int]:
    """Choose timesteps out of 0 … num_timesteps - 1, ascending.

    ``sections`` is a step count (``50`` or ``"50"``), one count per equal section of the process
    (``[10, 15, 20]`` or ``"10,15,20"``), ``"ddimN"`` for N steps at an integer stride from 0, or
    ``""`` for every step. Counts spread a section's steps evenly and include its first and last
    (a count of 1 takes the first, 0 skips the section); the stride accumulates as a float and
    rounds half to even, as published, so that the same string names the same steps.

    Raises InputError for counts that do not fit, and for "ddimN" when no integer stride gives N.
    """
    num_timesteps = _count(num_timesteps, "the number of timesteps", minimum=1)
    if isinstance(sections, str):
        text = sections.strip()
        if not text:
            return list(range(num_timesteps))
        if text.startswith("ddim"):
            return _ddim_timesteps(num_timesteps, text)
        counts = [_parse(part, sections) for part in text.split(",")]
    elif isinstance(sections, Iterable):
        counts = [_count(count, "a section's step count") for count in sections]
    else:
        counts = [_count(sections, "the step count")]
    return _section_timesteps(num_timesteps, counts)


def spaced_timesteps(
    num_timesteps_or_process: int | Process,
    steps: str | int | Iterable[int],
    spacing: str,
    **options: Any,
) -> list[int]:
    """``steps`` timesteps out of 0 … T − 1, ascending and distinct, by the name of their spacing.

    ``"uniform"``: :func:`space_timesteps`, whose sections ``steps`` may be; both ends are taken.
    ``"quadratic"``: linspace(0, √(0.8·T), steps)² rounded down, the choice of DDIM's code for
    CIFAR-10 (Song et al. 2020 appendix D.2; ``skip_type="quad"``). It starts at 0.8·T.
    ``"trailing"``: round(T, T − T/steps, T − 2T/steps, …) − 1, diffusers' name and rounding (Lin et
    al. 2023, arXiv:2305.08891, table 2). It takes T − 1; its last step is from about T/steps − 1.
    ``"karras"``, ``"exponential"``, ``"polynomial"``, ``"beta"``: nearest to the levels of
    these spacings (spacings.py), whose ``options`` they take; they need the process, not T.
    ``"logsnr"``: another name of ``"exponential"``, nearest to evenly spread values of λ =
    log(signal / noise).

    Where timesteps would coincide, the later of them move up to the next free one; at T − 1 the
    earlier move down. Raises InputError for an unknown spacing or option, a count that is no
    integer in 1 … T (sections belong to ``"uniform"``), and a spacing of levels without a process.
    """
    _check_spacing(spacing, options)
    levels = None
    if isinstance(num_timesteps_or_process, int | np.integer):
        num_timesteps = _count(num_timesteps_or_process, "the number of timesteps", minimum=1)
    else:
        levels = log_snr(num_timesteps_or_process)
        num_timesteps = len(levels)
    if spacing == "uniform":
        return space_timesteps(num_timesteps, steps)
    count = _number_of_steps(steps, spacing)
    if count > num_timesteps:
        raise InputError(
            f"cannot choose {count} of {num_timesteps} steps: expected 1 … all of them"
        )
    if spacing == "quadratic":
        # DDIM's ermongroup/ddim, runners/diffusion.py.
        positions = (np.linspace(0, np.sqrt(0.8 * num_timesteps), count) ** 2).astype(np.int64)
    elif spacing == "trailing":
        # The rounded stride may make arange one element too long.
        stride = num_timesteps / count
        descending = np.arange(num_timesteps, 0, -stride).round()[:count] - 1
        positions = descending[::-1].astype(np.int64)
    elif levels is not None:
        own = Grid(np.arange(num_timesteps, dtype=np.float64), levels)
        by_level = "exponential" if spacing == "logsnr" else spacing
        wanted = spread(Span(own, 0, num_timesteps - 1), count, by_level, options)
        positions = own.timesteps_at(wanted).round().astype(np.int64)
    else:
        raise InputError(
            f"spacing {spacing!r} needs noise levels, got {num_timesteps} steps: "
            "give a process (a GaussianDiffusion, a VarianceExploding, an EDM)"
        )
    return distinct_steps(positions, num_timesteps).tolist()


class Respaced(Strided):
    """A process that can be strided, and has levels between its steps too."""

    prior_std: float  # of x_T

    def respace(
        self,
        sections: str | int | Iterable[int] | None = None,
        *,
        spacing: str = "uniform",
        timesteps: TimestepMap | None = None,
        rounded: bool = False,
        **options: float,
    ) -> Self:
        """The strided process over a subsequence of the timesteps; the levels at those unchanged.

        The network still receives the original timesteps, which between two steps are no integers.

        Args:
            sections: as :func:`fastdiff.space_timesteps`, counted in this process's own K steps;
                with a ``spacing`` other than "uniform" a number of steps.
            spacing: "uniform", "quadratic", "trailing" or "logsnr", of this process's steps
                (:func:`fastdiff.process.respacing.spaced_timesteps`); "karras", "exponential",
                "polynomial" or "beta", of levels that may lie between them
                (fastdiff/process/spacings.py; :meth:`at_log_snr`).
            timesteps: in place of both a list that ascends strictly within 0 … K − 1, fractions
                between two steps.
            rounded: take the nearest steps, all distinct, in place of the levels themselves: for a
                network that is given integers.
            options: the spacing's own: ``rho`` of "karras" (7) and "polynomial" (1),
                ``alpha`` and ``beta`` of "beta" (0.6).

        Raises InputError for what does not fit.
        """
        chosen = _chosen(self, sections, spacing, timesteps, rounded, options)
        if not isinstance(chosen, list):
            return self.at_log_snr(chosen)
        return self._at_steps(chosen, sections if spacing == "uniform" else None)

    @abstractmethod
    def at_log_snr(self, values: npt.ArrayLike) -> Self:
        """The process over the levels with these λ = log(signal / noise), in any order."""

    @abstractmethod
    def grid(self) -> Grid:
        """λ at the unstrided process's steps and between them."""

    @abstractmethod
    def _at_steps(self, steps: list[int], sections: Any) -> Self:
        """The process over these of its own steps; ``sections``: by which they were chosen."""


def _chosen(
    process: Respaced,
    sections: str | int | Iterable[int] | None,
    spacing: str,
    timesteps: Iterable[float] | None,
    rounded: bool,
    options: Mapping[str, Any],
) -> list[int] | Float64Array:
    """What is taken of a process: steps of its own, or λ (K,), falling, between them.

    Steps are those of a spacing of steps, of one of levels that is ``rounded``, and integer
    ``timesteps``. ``timesteps`` ascend strictly within 0 … K − 1 of the process, fractions between
    two of its steps. Raises InputError for others, and unless exactly one of ``sections`` and
    ``timesteps`` is given.
    """
    if timesteps is None:
        if sections is None:
            raise InputError("respace needs a number of steps, sections, or timesteps: give one")
        _check_spacing(spacing, options)
        if spacing in STEP_SPACINGS or rounded:
            return spaced_timesteps(process, sections, spacing, **options)
        first, last = process.timestep_map[[0, -1]]
        count = _number_of_steps(sections, spacing)
        return spread(Span(process.grid(), first, last), count, spacing, options)
    if sections is not None or spacing != "uniform" or rounded or options:
        raise InputError("timesteps already say which steps to take: give no sections or spacing")
    chosen = _checked_timesteps(timesteps, len(process.timestep_map))
    if all(step.is_integer() for step in chosen):
        return [int(step) for step in chosen]
    steps = np.arange(len(process.timestep_map))
    return process.grid().log_snr_at(np.interp(chosen, steps, process.timestep_map))


def _check_spacing(spacing: str, options: Mapping[str, Any]) -> None:
    if spacing not in SPACINGS:
        raise InputError(f"spacing is {spacing!r}; expected one of {', '.join(SPACINGS)}")
    check_options(spacing, options)


def _number_of_steps(steps: str | int | Iterable[int], spacing: str) -> int:
    if isinstance(steps, str) and steps.strip().isdecimal():
        steps = int(steps)
    try:
        count = operator.index(steps)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(
            f"spacing {spacing!r} takes a number of steps, an integer, got {steps!r}: "
            "sections belong to spacing 'uniform'"
        ) from None
    if count < 1:
        raise InputError(f"cannot choose {count} steps: expected 1 or more")
    return count


def _checked_timesteps(timesteps: Iterable[float], num_timesteps: int) -> list[float]:
    if not isinstance(timesteps, Iterable) or isinstance(timesteps, str):
        raise InputError(f"timesteps must be a list of numbers, got {timesteps!r}")
    chosen = [_timestep(step) for step in timesteps]
    if not chosen:
        raise InputError("timesteps is empty: give at least one")
    for before, after in zip(chosen, chosen[1:], strict=False):
        if after <= before:
            raise InputError(
                f"timesteps must ascend strictly, but {after:g} comes after {before:g}: "
                "sort them, each once, the least noisy first"
            )
    for step in (chosen[0], chosen[-1]):
        if not 0 <= step <= num_timesteps - 1:
            raise InputError(
                f"timesteps must lie in 0 … {num_timesteps - 1}, the steps of this process, "
                f"got {step:g}"
            )
    return chosen


def _timestep(step: Any) -> float:
    value = step.item() if isinstance(step, np.ndarray | Tensor) and step.ndim == 0 else step
    if not is_finite(value):
        raise InputError(f"each of timesteps must be a finite number, got {step!r}")
    return float(value)


def distinct_steps(positions: npt.NDArray[np.int64], num_timesteps: int) -> npt.NDArray[np.int64]:
    """Ascending ``positions`` as distinct ones in 0 … num_timesteps − 1, moved no further than
    needed: up, and from the upper end down."""
    index = np.arange(len(positions))
    pushed_up = np.maximum.accumulate(positions - index) + index
    return np.minimum(pushed_up, num_timesteps - len(positions) + index)


def _ddim_timesteps(num_timesteps: int, text: str) -> list[int]:
    wanted = _parse(text.removeprefix("ddim"), text)
    counts = [len(range(0, num_timesteps, stride)) for stride in range(1, num_timesteps + 1)]
    if wanted in counts:
        return list(range(0, num_timesteps, counts.index(wanted) + 1))
    nearest = sorted(sorted(set(counts), key=lambda count: abs(count - wanted))[:2])
    raise InputError(
        f"{text!r}: no integer stride takes exactly {wanted} of {num_timesteps} steps; "
        f"the nearest counts that work: {', '.join(map(str, nearest))}"
    )


def _section_timesteps(num_timesteps: int, counts: list[int]) -> list[int]:
    if not counts or sum(counts) == 0:
        raise InputError("the sections choose no timesteps: ask for at least one")
    size_per, extra = divmod(num_timesteps, len(counts))
    chosen: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = size_per + (1 if i < extra else 0)
        if count > size:
            raise InputError(
                f"cannot choose {count} steps from section {i + 1} of {len(counts)}, "
                f"which has {size} of the {num_timesteps} steps"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            chosen.append(start + round(position))
            position += stride
        start += size
    return chosen


def _parse(text: str, whole: str) -> int:
    try:
        return _count(int(text), "a step count")
    except ValueError:  # InputError is one as well: both mean the text names no count
        raise InputError(
            f"cannot read the respacing {whole!r}: expected a count such as '50', "
            "counts per section such as '10,15,20', or 'ddim50'"
        ) from None


def _count(value: int, what: str, minimum: int = 0) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise InputError(f"{what} must be an integer, got {value!r}") from None
    if count < minimum:
        raise InputError(f"{what} must be at least {minimum}, got {count}")
    return count

"""Strided subsequences of timesteps: published sections, other spacings, or a list.

Nichol & Dhariwal 2021 section 4; DDIM (Song et al. 2020); DPM-Solver (Lu et al. 2022,
arXiv:2206.00927).
"""

import operator
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from fastdiff.errors import InputError
from fastdiff.methods.protocol import Process, noise_levels

SPACINGS = ("uniform", "quadratic", "trailing", "logsnr")


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
    num_timesteps_or_process: int | Process, steps: str | int | Iterable[int], spacing: str
) -> list[int]:
    """``steps`` timesteps out of 0 … T − 1, ascending and distinct, by the name of their spacing.

    ``"uniform"``: :func:`space_timesteps`, whose sections ``steps`` may be; both ends are taken.
    ``"quadratic"``: linspace(0, √(0.8·T), steps)² rounded down, the choice of DDIM's code for
    CIFAR-10 (Song et al. 2020 appendix D.2; ``skip_type="quad"``). It starts at 0.8·T.
    ``"trailing"``: round(T, T − T/steps, T − 2T/steps, …) − 1, diffusers' name and rounding (Lin et
    al. 2023, arXiv:2305.08891, table 2). It takes T − 1; its last step is from about T/steps − 1.
    ``"logsnr"``: nearest to evenly spread values of λ = log(signal / noise), both ends taken, as
    DPM-Solver's ``skip_type="logSNR"``; needs the process, not T. A last step without signal
    (λ = −∞) is taken, and the others are spread over the rest.

    Where timesteps would coincide, the later of them move up to the next free one; at T − 1 the
    earlier move down. Raises InputError for an unknown spacing, a count that is no integer in
    1 … T (sections belong to ``"uniform"``), and ``"logsnr"`` without a process.
    """
    if spacing not in SPACINGS:
        raise InputError(f"spacing is {spacing!r}; expected one of {', '.join(SPACINGS)}")
    log_snr = None
    if isinstance(num_timesteps_or_process, int | np.integer):
        num_timesteps = _count(num_timesteps_or_process, "the number of timesteps", minimum=1)
    else:
        log_snr = _log_snr(num_timesteps_or_process)
        num_timesteps = len(log_snr)
    if spacing != "uniform" and isinstance(steps, str) and steps.strip().isdecimal():
        steps = int(steps)
    if spacing == "uniform":
        return space_timesteps(num_timesteps, steps)
    try:
        count = operator.index(steps)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(
            f"spacing {spacing!r} takes a number of steps, an integer, got {steps!r}: "
            "sections belong to spacing 'uniform'"
        ) from None
    if not 1 <= count <= num_timesteps:
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
    elif log_snr is not None:
        positions = _nearest_evenly_spread(log_snr, count)
    else:
        raise InputError(
            f"spacing 'logsnr' needs noise levels, got {num_timesteps} steps: "
            "give a process (a GaussianDiffusion, a VarianceExploding, an EDM)"
        )
    return _distinct(positions, num_timesteps).tolist()


def chosen_timesteps(
    process: Process,
    sections: str | int | Iterable[int] | None,
    spacing: str,
    timesteps: Sequence[int] | npt.NDArray[np.int64] | None,
) -> list[int]:
    """The steps that a process's ``respace`` takes: a spacing's, or ``timesteps`` themselves.

    ``timesteps`` ascend strictly within 0 … K − 1 of the process. Raises InputError for others,
    and unless exactly one of ``sections`` and ``timesteps`` is given.
    """
    if timesteps is None:
        if sections is None:
            raise InputError("respace needs a number of steps, sections, or timesteps: give one")
        return spaced_timesteps(process, sections, spacing)
    if sections is not None or spacing != "uniform":
        raise InputError("timesteps already say which steps to take: give no sections or spacing")
    num_timesteps = len(noise_levels(process)[0])
    if not isinstance(timesteps, Iterable) or isinstance(timesteps, str):
        raise InputError(f"timesteps must be a list of integers, got {timesteps!r}")
    chosen = [_count(step, "each of timesteps") for step in timesteps]
    if not chosen:
        raise InputError("timesteps is empty: give at least one")
    for before, after in zip(chosen, chosen[1:], strict=False):
        if after <= before:
            raise InputError(
                f"timesteps must ascend strictly, but {after} comes after {before}: "
                "sort them, each once, the least noisy first"
            )
    if chosen[-1] >= num_timesteps:
        raise InputError(
            f"timesteps must lie in 0 … {num_timesteps - 1}, the steps of this process, "
            f"got {chosen[-1]}"
        )
    return chosen


def _log_snr(process: Process) -> npt.NDArray[np.float64]:
    """λ = log(signal / noise), (K,) falling; −∞ where no signal is left."""
    signal, noise = noise_levels(process)
    with np.errstate(divide="ignore"):
        return np.log(signal) - np.log(noise)


def _nearest_evenly_spread(log_snr: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """Ascending indices, perhaps equal ones, of the λ nearest to ``count`` evenly spread values."""
    last = len(log_snr) - 1
    if count == 1:
        return np.array([last])  # sampling has to start from noise
    if np.isneginf(log_snr[last]):
        return np.append(_nearest_evenly_spread(log_snr[:last], count - 1), last)
    wanted = np.linspace(log_snr[0], log_snr[last], count)
    above = np.searchsorted(-log_snr, -wanted).clip(1, last)  # λ[above − 1] ≥ wanted ≥ λ[above]
    nearer_below = log_snr[above - 1] - wanted <= wanted - log_snr[above]
    return above - nearer_below


def _distinct(positions: npt.NDArray[np.int64], num_timesteps: int) -> npt.NDArray[np.int64]:
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

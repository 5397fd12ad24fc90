"""What of a sampler can change between calls, and the strided process and table it makes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from fastdiff.checks import is_finite
from fastdiff.errors import InputError
from fastdiff.methods.inversion import encoding_table
from fastdiff.methods.table import StepTable
from fastdiff.sampling.recommended import count_of, recommended
from fastdiff.sampling.reuse import Extent, Reuse, Rows, checked_rows, extents, reuse_of

AUTO = "auto"  # the method


@dataclass(frozen=True)
class Settings:
    """Sampler's arguments of the same names. InputError for what is no value of theirs.

    ``spacing`` None is "uniform", or what ``method`` "auto" chooses.
    """

    steps: int | str | None = None
    spacing: str | None = None
    spacing_options: Mapping[str, Any] | None = None
    timesteps: Sequence[float] | None = None
    method: str = "ddpm"
    eta: float | None = None
    method_options: Mapping[str, Any] | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    clip_denoised: bool = True
    dynamic_threshold: float | None = None
    reuse: Reuse | Rows | None = None
    guidance_reuse: Rows | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.timesteps is not None:
            raise InputError("steps and timesteps are both given; expected one of them")
        if self.spacing not in (None, "uniform") and self.steps is None:
            raise InputError(f"spacing {self.spacing!r} spaces steps; give steps=, a count")
        for name in ("spacing_options", "method_options"):
            given = getattr(self, name)
            if given is not None and not (isinstance(given, Mapping) and all(map(_is_name, given))):
                raise InputError(f"{name} is {given!r}; expected a dict of names and values")
        if self.spacing_options and self.steps is None:
            raise InputError("spacing_options belong to a spacing of steps; give steps=, a count")
        if self.guidance_scale is not None and not is_finite(self.guidance_scale):
            raise InputError(f"guidance_scale is {self.guidance_scale!r}; expected a finite number")
        if self.guidance_interval is not None:
            _check_interval(self.guidance_interval, self.guidance_scale)
        rescale = self.guidance_rescale
        if not (is_finite(rescale) and 0 <= rescale <= 1):
            raise InputError(f"guidance_rescale is {rescale!r}; expected a share in 0 … 1")
        if rescale and self.guidance_scale is None:
            raise InputError("guidance_rescale belongs to guidance; give guidance_scale too")
        quantile = self.dynamic_threshold
        if quantile is not None and not (is_finite(quantile) and 0 < quantile <= 1):
            raise InputError(
                f"dynamic_threshold is {quantile!r}; expected a quantile above 0, at most 1"
            )

        object.__setattr__(self, "reuse", reuse_of(self.reuse))
        if self.guidance_reuse is not None:
            if self.guidance_scale is None:
                raise InputError("guidance_reuse belongs to guidance; give guidance_scale too")
            rows = checked_rows("guidance_reuse", self.guidance_reuse)
            object.__setattr__(self, "guidance_reuse", rows)

    @property
    def depth(self) -> int:
        """At which the network is cut in two; 0 where none of it is reused."""
        return self.reuse.depth if isinstance(self.reuse, Reuse) and self.reuse.rows != 1 else 0

    def extents(self, guided: Sequence[bool], skipped: int) -> list[Extent]:
        """How much of the network a call's rows run (reuse.py)."""
        features = self.reuse.rows if isinstance(self.reuse, Reuse) else None
        return extents(guided, features, self.guidance_reuse, skipped)

    def changed(self, changes: dict[str, Any]) -> "Settings":
        """With some of them replaced; of steps and timesteps the one that is named holds."""
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                raise InputError(
                    f"{name!r} cannot be configured; expected one of {', '.join(known)}"
                )
        if changes.get("steps") is not None:
            changes = {"timesteps": None} | changes
        if changes.get("timesteps") is not None:
            changes = {"steps": None, "spacing": None, "spacing_options": None} | changes
        return replace(self, **changes)

    def chosen(self, process: Any) -> "Settings":
        """With a method, and the spacing that goes with it, in the place of "auto"."""
        if self.method != AUTO:
            return self
        if isinstance(process, StepTable):
            return replace(self, method=process.method)
        method, spacing = recommended(count_of(process, self.steps, self.timesteps))
        counted = isinstance(self.steps, int) or str(self.steps).strip().isdecimal()
        between = process.mean_type != "previous_x"  # which is known at the process's steps alone
        if self.spacing is None and self.steps is not None and counted and between:
            return replace(self, method=method, spacing=spacing)
        return replace(self, method=method)

    def strided(self, process: Any) -> Any:
        """The process over the steps that are taken; a StepTable is its own."""
        if isinstance(process, StepTable):
            chosen = (self.steps, self.timesteps, self.eta, self.method_options, self.clip_denoised)
            if chosen != (None, None, None, None, True) or self.method not in (
                "ddpm",
                process.method,
            ):
                raise InputError(
                    "a StepTable says which steps are taken and how; steps, timesteps, method, "
                    "eta, method_options and clip_denoised belong to a process"
                )
            return process
        if self.timesteps is not None:
            return process.respace(timesteps=self.timesteps)
        if self.steps is None:
            return process
        options = _free_of("spacing_options", self.spacing_options, ("sections", "spacing"))
        return process.respace(self.steps, spacing=self.spacing or "uniform", **options)

    def table(self, strided: Any, start: int = 0) -> StepTable:
        """Of the strided process, without so many of its noisiest steps."""
        if isinstance(strided, StepTable):
            return strided
        return StepTable.from_process(strided, start=start, **self._of_method())

    def encoding_table(self, strided: Any) -> StepTable:
        """Of the way back, from an image to the noise that ``table`` makes it of."""
        if isinstance(strided, StepTable):
            raise InputError(
                "the sampler is of a StepTable, whose rows lead from noise to an image alone; for "
                "the way back give it a process"
            )
        return encoding_table(strided, **self._of_method())

    def _of_method(self) -> dict[str, Any]:
        own = {"method": self.method, "eta": self.eta, "clip_denoised": self.clip_denoised}
        taken = ("process", "dtype", "start", *own)
        return {**own, **_free_of("method_options", self.method_options, taken)}

    def is_guided(self, timestep: float) -> bool:
        """Whether guidance is used at a timestep of the network's."""
        if self.guidance_scale is None:
            return False
        low, high = self.guidance_interval or (float("-inf"), float("inf"))
        return low <= timestep <= high


def _is_name(key: Any) -> bool:
    return isinstance(key, str)


def _free_of(
    what: str, options: Mapping[str, Any] | None, taken: Sequence[str]
) -> Mapping[str, Any]:
    """``options``; InputError for one whose name another argument has."""
    for name in options or {}:
        if name in taken:
            raise InputError(f"{what} has {name!r}, which is no option of its own")
    return options or {}


def _check_interval(interval: Any, scale: float | None) -> None:
    if scale is None:
        raise InputError("guidance_interval belongs to guidance; give guidance_scale too")
    try:
        low, high = interval
        ordered = low <= high
    except (TypeError, ValueError):
        ordered = False
    if not ordered:
        raise InputError(
            f"guidance_interval is {interval!r}; expected (low, high), two timesteps, low ≤ high"
        )

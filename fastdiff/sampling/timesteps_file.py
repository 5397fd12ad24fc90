"""A file of timesteps that were measured for one process and method, as JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fastdiff.errors import InputError
from fastdiff.files import replace_text
from fastdiff.methods.protocol import noise_levels
from fastdiff.process.respacing import Respaced

_ALIKE = 1e-6  # levels whose relative difference is less are the same


@dataclass(frozen=True)
class MeasuredTimesteps:
    """What ``measured_timesteps`` found.

    Attributes: ``timesteps``, for ``process.respace(timesteps=…)`` and ``Sampler(timesteps=…)``;
    ``method``, that they were measured with; ``error``, the root mean square distance of its
    samples from the fine solution's; ``by_spacing``, that of as many steps by the spacings from
    which the search began; ``calls``, the network calls it took; ``process`` and ``num_timesteps``,
    the class and length of the process they are of, ``signal_scale`` and ``noise_scale``, its
    levels at ``timesteps``.
    """

    timesteps: list[float]
    method: str
    error: float
    by_spacing: dict[str, float]
    calls: int
    process: str
    num_timesteps: int
    signal_scale: list[float]
    noise_scale: list[float]

    @classmethod
    def of(
        cls,
        process: Respaced,
        timesteps: list[float],
        *,
        method: str,
        error: float,
        by_spacing: dict[str, float],
        calls: int,
    ) -> "MeasuredTimesteps":
        """With the levels of ``process`` at these of its timesteps."""
        signal, noise = noise_levels(process.respace(timesteps=timesteps))
        return cls(
            timesteps=timesteps,
            method=method,
            error=error,
            by_spacing=by_spacing,
            calls=calls,
            process=type(process).__name__,
            num_timesteps=len(process.timestep_map),
            signal_scale=signal.tolist(),
            noise_scale=noise.tolist(),
        )

    def save(self, path: str | Path) -> None:
        """Make it the file's content, whole or not at all."""
        replace_text(Path(path), json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "MeasuredTimesteps":
        """What :meth:`save` wrote. Raises InputError for any other file."""
        try:
            found = cls(**json.loads(Path(path).read_text(encoding="utf-8")))
            columns = (found.timesteps, found.signal_scale, found.noise_scale)
            if np.array(columns, dtype=np.float64).ndim != 2:
                raise ValueError("not a number of each for every timestep")
            return found
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from None
        except (TypeError, ValueError):
            raise InputError(
                f"{path} holds no measured timesteps; expected a file that "
                "MeasuredTimesteps.save or 'fastdiff timesteps' wrote"
            ) from None

    def of_process(self, process: Respaced, method: str) -> list[float]:
        """``timesteps``, for a sampler of ``process`` by ``method``.

        Raises InputError for another process than they were measured for, and another method.
        """
        if method != self.method:
            raise InputError(
                f"the timesteps were measured for method {self.method!r}, not for {method!r}: take "
                "that method, or measure timesteps for this one"
            )
        if not self._is_of(process):
            raise InputError(
                f"the timesteps were measured for a {self.process} of {self.num_timesteps} steps "
                "with other noise levels than this process's: measure them for this one"
            )
        return self.timesteps

    def _is_of(self, process: Respaced) -> bool:
        own = (type(process).__name__, len(process.timestep_map))
        if own != (self.process, self.num_timesteps):
            return False
        levels = noise_levels(process.respace(timesteps=self.timesteps))
        known = (self.signal_scale, self.noise_scale)
        return all(map(lambda a, b: np.allclose(a, b, rtol=_ALIKE, atol=0.0), levels, known))

"""What the schedulers with ``sigmas`` share: the step that a call is, and its noise level's σ."""

from collections.abc import Hashable

import torch
from torch import Tensor

from fastdiff.integrations.diffusers.fused import FusedScheduler, version


class SigmaScheduler(FusedScheduler):
    """A scheduler whose step i leads from ``sigmas[i]`` to ``sigmas[i + 1]``, and counts."""

    timesteps: Tensor
    sigmas: Tensor
    step_index: int | None
    begin_index: int | None

    def _index(self, timestep: float | Tensor) -> int | str:
        """The step that a call is, or why it is none of the schedule's."""
        index = self.step_index
        if index is None:
            index = self.begin_index
        if index is None:
            if isinstance(timestep, Tensor):
                timestep = timestep.to(self.timesteps.device)
            try:
                index = self.index_for_timestep(timestep)  # type: ignore[attr-defined]
            except IndexError:
                return f"timestep {timestep} is not among scheduler.timesteps"
        steps = len(self.timesteps)
        if not (0 <= index < steps and steps < len(self.sigmas)):
            return f"step {index} of {steps} has no noise level"
        return index

    def _watched(self) -> tuple[Hashable, ...]:
        """What changes when the noise levels do."""
        return id(self.sigmas), version(self.sigmas)


def is_integer(timestep: float | Tensor) -> bool:
    """Whether the schedulers that interpolate timesteps refuse this one, as a place in the list."""
    return isinstance(timestep, int | torch.IntTensor | torch.LongTensor)


def exploding_columns(prediction_type: str, sigma: Tensor) -> dict[str, Tensor | float]:
    """x_0 = a·x + b·output of x = x_0 + σ·ε, which the network is given times ``input_scale``."""
    scales: dict[str, Tensor | float] = {"input_scale": 1 / (sigma**2 + 1) ** 0.5}
    if prediction_type == "epsilon":
        return scales | {"a": 1.0, "b": -sigma}
    if prediction_type == "v_prediction":
        return scales | {"a": 1 / (sigma**2 + 1), "b": -sigma / (sigma**2 + 1) ** 0.5}
    return scales | {"a": 0.0, "b": 1.0}  # sample

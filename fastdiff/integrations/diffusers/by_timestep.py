"""What DDPM, DDIM and PNDM share: a row per timestep, found without waiting for a device."""

import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.integrations.diffusers.fused import FusedScheduler, Rows, combine, version


@dataclass(frozen=True, slots=True)
class TimestepRows(Rows):
    """Rows in the order of ``scheduler.timesteps`` (K,), whose memory begins at ``address``.

    ``steps``: K. More rows follow in the same order, where a step may be taken in several ways.
    """

    row_of: dict[int, int]
    steps: int
    address: int | None  # None: they are not an int64 tensor without gaps

    def row(self, timestep: int | Tensor) -> int | str:
        """The timestep's row, or why there is none.

        Pipelines iterate over ``scheduler.timesteps``: a view into them tells its row by where it
        lies. Other tensors are read, which waits for their device.
        """
        if isinstance(timestep, Tensor):
            if timestep.ndim or timestep.dtype not in (torch.int64, torch.int32):
                return f"timestep is a {timestep.dtype} tensor of shape {tuple(timestep.shape)}"
            if self.address is not None and timestep.dtype == torch.int64:
                offset = timestep.data_ptr() - self.address
                if 0 <= offset < 8 * self.steps:
                    return offset // 8
        try:
            value = operator.index(timestep)
        except TypeError:
            return f"timestep is a {type(timestep).__name__}, not an integer"
        return self.row_of.get(value, f"timestep {value} is not among scheduler.timesteps")


class TimestepScheduler(FusedScheduler):
    """A scheduler whose step depends on ᾱ at a timestep and at the one before it."""

    timesteps: Tensor
    alphas_cumprod: Tensor

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = √ᾱ_t·x_0 + √(1 − ᾱ_t)·noise, (N, ...); float32 inside whatever the dtype."""
        signal, sigma = self._scales(original_samples)
        return combine(original_samples, noise, timesteps, signal, sigma)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = √ᾱ_t·noise − √(1 − ᾱ_t)·sample, (N, ...); float32 inside whatever the dtype."""
        signal, sigma = self._scales(sample)
        return combine(noise, sample, timesteps, signal, -sigma)

    def _scales(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1 − ᾱ), (T,), on a tensor's device; float64 for float64."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        # As in diffusers: the next call finds it where the samples are.
        self.alphas_cumprod = self.alphas_cumprod.to(like.device)
        alphas = self.alphas_cumprod.to(dtype)
        return alphas**0.5, (1 - alphas) ** 0.5

    def _watched(self) -> tuple[int, int, int, int]:
        """What changes when timesteps or ᾱ do."""
        timesteps, alphas = self.timesteps, self.alphas_cumprod
        return id(timesteps), version(timesteps), id(alphas), version(alphas)

    def _address(self) -> int | None:
        plain = self.timesteps.dtype == torch.int64 and self.timesteps.is_contiguous()
        return self.timesteps.data_ptr() if plain else None

    def _alphas_at(self, timesteps: list[int]) -> Tensor:
        """ᾱ at these timesteps, float32 (K,) on the CPU; NaN where there is none."""
        alphas = self.alphas_cumprod.cpu()
        count = len(alphas)
        index = torch.tensor(timesteps)
        inside = (index >= -count) & (index < count)
        return torch.where(inside, alphas[index.clamp(-count, count - 1)], torch.nan)


def first_rows(timesteps: list[int]) -> dict[int, int]:
    """Where each timestep occurs first."""
    rows: dict[int, int] = {}
    for row, timestep in enumerate(timesteps):
        rows.setdefault(timestep, row)
    return rows


def x_start_columns(prediction_type: str, alpha: Tensor) -> dict[str, Tensor | float]:
    """x_0 = a·x_t + b·output, from ᾱ (K,)."""
    signal, sigma = alpha**0.5, (1 - alpha) ** 0.5
    if prediction_type == "epsilon":
        return {"a": 1 / signal, "b": -sigma / signal}
    if prediction_type == "v_prediction":
        return {"a": signal, "b": -sigma}
    return {"a": 0.0, "b": 1.0}  # sample

"""Where x_T and the noise of every sampling step come from."""

from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.methods.table import Index
from fastdiff.ops.normal import op as rng
from fastdiff.process.published_loops import StepNoise, noise_of_step


class CounterNoise:
    """Counter-based noise: sample i of a seed draws the same in any batch.

    ``seed`` and ``first_sample`` are numbers, or int64 tensors of one element on ``device``.
    """

    kind = "counter"

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        seed: int | Tensor,
        first_sample: int | Tensor,
    ):
        self.shape, self.device = shape, device
        self.seed, self.first_sample = seed, first_sample

    def x_T(self) -> Tensor:
        return rng.normal(
            self.shape, seed=self.seed, first_sample=self.first_sample, device=self.device
        )

    def of_step(self, i: Index, noisy: bool) -> dict[str, Any]:
        """posterior_step's arguments for row i; ``noisy``: whether the row draws noise."""
        return {"seed": self.seed, "first_sample": self.first_sample}

    def of_known(self, i: Index) -> dict[str, Any]:
        """q_sample's arguments for the known region after row i."""
        return self.of_step(i, True) | {"step": rng.FIRST_KNOWN_STEP + i}

    def draw_known(self, i: int, out: Tensor) -> None:
        """``of_known``'s noise, into a tensor."""
        step, first = rng.known_step(i), self.first_sample
        rng.normal(self.shape, seed=self.seed, step=step, first_sample=first, out=out)


class TorchNoise:
    """torch.randn from a generator of a seed: x_T first and then step by step, as published."""

    kind = "drawn"

    def __init__(self, shape: tuple[int, ...], device: torch.device, seed: int):
        self.shape, self.device = shape, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def x_T(self) -> Tensor:
        return torch.randn(self.shape, generator=self.generator, device=self.device)

    def of_step(self, i: Index, noisy: bool) -> dict[str, Any]:
        # The published loops draw at quiet rows too (the last; every one of DDIM with eta = 0).
        # Nothing is drawn after those, so leaving them out changes no sample.
        return {"noise": self.x_T()} if noisy else {}

    def of_known(self, i: Index) -> dict[str, Any]:
        return {"noise": self.x_T()}

    def draw_step(self, i: int, noisy: bool, out: Tensor) -> None:
        if noisy:
            self._draw(out)

    def draw_known(self, i: int, out: Tensor) -> None:
        self._draw(out)

    def _draw(self, out: Tensor) -> None:
        torch.randn(self.shape, generator=self.generator, out=out)


class GivenNoise:
    """The caller's noise of every step; all else from ``source``."""

    kind = "drawn"

    def __init__(self, source: CounterNoise | TorchNoise, step_noise: StepNoise, rows: int):
        self.source, self.step_noise, self.rows = source, step_noise, rows

    def x_T(self) -> Tensor:
        return self.source.x_T()

    def of_step(self, i: int, noisy: bool) -> dict[str, Any]:
        return {"noise": noise_of_step(self.step_noise, self.rows - 1 - i)}

    def of_known(self, i: int) -> dict[str, Any]:
        return self.source.of_known(i)

    def draw_step(self, i: int, noisy: bool, out: Tensor) -> None:
        given = self.of_step(i, noisy)["noise"]
        if given.shape != out.shape:
            raise InputError(
                f"noise has shape {tuple(given.shape)}; expected {tuple(out.shape)}, like x_t"
            )
        out.copy_(given)

    def draw_known(self, i: int, out: Tensor) -> None:
        self.source.draw_known(i, out)


Noise = CounterNoise | TorchNoise | GivenNoise


class HeldNoise:
    """Noise in tensors that a captured step reads; ``fill`` draws it anew before each replay."""

    kind = "drawn"

    def __init__(self, x: Tensor, known: bool):
        # In logical order, whatever x's layout: so torch.randn draws.
        self.step = torch.zeros(x.shape, device=x.device)
        self.known = torch.zeros(x.shape, device=x.device) if known else None

    def fill(self, source: TorchNoise | GivenNoise, i: int, noisy: bool) -> None:
        source.draw_step(i, noisy, self.step)
        if self.known is not None:
            source.draw_known(i, self.known)

    def of_step(self, i: Index, noisy: bool) -> dict[str, Any]:
        return {"noise": self.step}

    def of_known(self, i: Index) -> dict[str, Any]:
        return {"noise": self.known}


def noise_source(
    kind: str,
    shape: tuple[int, ...],
    device: torch.device,
    seed: int,
    first_sample: int,
    step_noise: StepNoise | None,
    rows: int,
) -> Noise:
    """The source of rng ``kind``, its numbers checked; ``step_noise`` replaces the steps' own."""
    seed = rng.check_integer("seed", seed, 2**64)
    if kind == "torch" and first_sample != 0:
        raise InputError(
            "first_sample numbers the samples of rng='counter'; rng='torch' has no numbering"
        )
    source: CounterNoise | TorchNoise
    if kind == "torch":
        source = TorchNoise(shape, device, seed)
    else:
        first_sample = rng.check_integer("first_sample", first_sample, 2**64 - (shape[0] - 1))
        source = CounterNoise(shape, device, seed, first_sample)
    return source if step_noise is None else GivenNoise(source, step_noise, rows)

"""Random rows of a step table on random tensors, and in float64 what they give and of what size."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.methods.rows import SLOTS
from fastdiff.methods.table import COLUMNS, StepTable
from fastdiff.ops import posterior_step
from kernel_tools import LAYOUTS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = 16  # of float32's on the way, each at most half an eps of all that is added
FACTORS = ("a", "b", "c", "d", "o", "sigma", "k", "q")


class StepCase(NamedTuple):
    """A call of posterior_step; slots of memory that its row does not read are full of NaN."""

    x_t: Tensor
    output: Tensor
    table: StepTable
    i: int
    noise: Tensor
    memory: tuple[Tensor, ...]
    unconditional: Tensor | None
    guidance_scale: float | Tensor | None
    output_scale: Tensor | None

    @classmethod
    def of(
        cls,
        seed: int,
        shape: Sequence[int],
        *,
        dtypes: Sequence[torch.dtype] = DTYPES,
        layouts: Sequence[str] = tuple(LAYOUTS),
        device: Any = "cpu",
    ) -> "StepCase":
        """All that is not given follows from ``seed``."""
        rng, generator = random.Random(seed), torch.Generator("cpu").manual_seed(seed)
        dtype, output_dtype = rng.choice(dtypes), rng.choice(dtypes)
        table = random_table(rng)
        i = rng.randrange(len(table))

        def normal(n: int, channels: int, dtype: torch.dtype) -> Tensor:
            drawn = torch.randn(n, channels, *shape[2:], generator=generator, device="cpu")
            return LAYOUTS[rng.choice(layouts)](drawn.to(device, dtype))

        (n, channels), doubled = shape[:2], 1 + table.doubled_output
        guided, apart, scaled = (rng.random() < 0.5 for _ in range(3))
        memory = tuple(normal(n, channels, rng.choice((dtype, *dtypes))) for _ in range(SLOTS))
        for slot, tensor in enumerate(memory):
            if getattr(table, f"e{slot}")[i] == 0:
                tensor.fill_(torch.nan)
        scale = rng.choice((0.0, 3.0, torch.tensor(1.5, device=device)))
        return cls(
            x_t=normal(n, channels, dtype),
            output=normal(n * (1 + (guided and not apart)), channels * doubled, output_dtype),
            table=table.to(device),
            i=i,
            noise=normal(n, channels, rng.choice(dtypes)),
            memory=memory[: table.slots],
            unconditional=normal(n, channels * rng.choice((1, 2)), rng.choice(dtypes))
            if guided and apart
            else None,
            guidance_scale=scale if guided else None,
            output_scale=normal(n, 1, torch.float32).flatten(1)[:, 0] if scaled else None,
        )

    def run(self, step: int | Tensor | None = None, **given: Any) -> tuple[Tensor, ...]:
        """(x_prev, x_0 or None); memory is written."""
        options = {
            "noise": self.noise, "memory": self.memory, "unconditional": self.unconditional,
            "guidance_scale": self.guidance_scale, "output_scale": self.output_scale,
        }  # fmt: skip
        step = self.i if step is None else step
        return posterior_step(self.x_t, self.output, self.table, step, **options | given)

    def fresh(self) -> "StepCase":
        """The same with memory of its own, in the layouts it had."""
        return self._replace(memory=tuple(map(copied, self.memory)))

    @property
    def slot(self) -> int:
        """That the row writes, or −1."""
        return self.table.slots_written[self.i]


def random_table(rng: random.Random) -> StepTable:
    """Three rows, of which every factor may be 0."""
    slots = rng.randrange(SLOTS + 1)

    def row() -> dict[str, float]:
        factors = (*FACTORS, *(f"e{slot}" for slot in range(slots)))
        numbers = {name: rng.choice((0.0, rng.uniform(-2, 2))) for name in factors}
        numbers |= {"clip": rng.choice((1.0, float("inf"))), "slot": rng.randrange(-1, slots)}
        low = rng.uniform(-3, 0)
        return numbers | {"log_min": low, "log_max": low + rng.random(), "timesteps": 0.0}

    return StepTable.from_rows([row() for _ in range(3)], doubled_output=rng.random() < 0.3)


def copied(tensor: Tensor) -> Tensor:
    """The same numbers in memory of their own, in the same strides, with what lies between them."""
    return whole(tensor).clone().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def whole(tensor: Tensor) -> Tensor:
    """All of the memory that ``tensor`` is a view of, in one dimension."""
    size = tensor.untyped_storage().nbytes() // tensor.itemsize
    return tensor.as_strided((size,), (1,), 0)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.itemsize == 4 else torch.int16)


def truths(case: StepCase) -> list[tuple[Tensor, Tensor]]:
    """x_prev, x_0 and what the row keeps, in float64, each with the size of what is added up."""
    row = {name: getattr(case.table, name)[case.i].double().cpu() for name in COLUMNS}
    x, output, z = (v.double().cpu() for v in (case.x_t, case.output, case.noise))
    n, channels = x.shape[:2]
    variance, said = output[:n, channels:], output[:, :channels]
    size = said.abs()
    if case.guidance_scale is not None:
        scale, other = float(case.guidance_scale), case.unconditional
        other = said[n:] if other is None else other[:, :channels].double().cpu()
        size = other.abs() + abs(scale) * (size[:n] + other.abs())
        said = other + scale * (said[:n] - other)
    if case.output_scale is not None:
        scale = case.output_scale.double().cpu().view(-1, *[1] * (x.dim() - 1))
        said, size = scale * said, scale.abs() * size
    x_0 = (row["a"] * x + row["b"] * said).clamp(-row["clip"], row["clip"])
    of_x_0 = (row["a"] * x).abs() + row["b"].abs() * size
    noise = row["sigma"] * z
    of_noise = noise.abs()
    if case.table.learned_variance:
        f = (variance + 1) / 2
        logarithm = 0.5 * (f * row["log_max"] + (1 - f) * row["log_min"])
        noise = noise * logarithm.exp()
        of_noise = noise.abs() * (2 + 0.5 * (f * row["log_max"]).abs() + (f - 1).abs())
    held = [
        row[f"e{slot}"] * tensor.double().cpu()
        for slot, tensor in enumerate(case.memory)
        if row[f"e{slot}"] != 0
    ]
    x_prev = row["c"] * x_0 + row["d"] * x + row["o"] * said + sum(held) + noise
    of_x_prev = row["c"].abs() * of_x_0 + (row["d"] * x).abs() + row["o"].abs() * size + of_noise
    of_x_prev = of_x_prev + sum(v.abs() for v in held)
    kept = row["k"] * x_0 + row["q"] * x
    of_kept = row["k"].abs() * of_x_0 + (row["q"] * x).abs()
    return [(x_prev, of_x_prev), (x_0, of_x_0), (kept, of_kept)]


def assert_within(result: Tensor, truth: Tensor, size: Tensor, ulp: float = 0.5) -> None:
    """Up to float32's rounding of what was added, and one of the storage, ``ulp`` of its eps."""
    stored = torch.finfo(result.dtype)
    on_the_way = ROUNDINGS * torch.finfo(torch.float32).eps * size
    once = ulp * stored.eps * (truth.abs() + on_the_way) + stored.smallest_normal * stored.eps
    excess = (result.double().cpu() - truth).abs() - on_the_way - once
    assert (excess <= 0).all(), f"{excess.max()} beyond float32's rounding and the storage's"


def check(case: StepCase, step: int | Tensor | None = None, ulp: float = 0.5) -> None:
    """A copy of ``case``, run, answers and keeps what is within the bounds, and leaves all else of
    its memory as it was."""
    run = case.fresh()
    x_prev, x_start = run.run(step)
    of_x_prev, of_x_start, of_kept = truths(case)
    assert x_prev.dtype == x_start.dtype == case.x_t.dtype
    assert_within(x_prev, *of_x_prev, ulp)
    assert_within(x_start, *of_x_start, ulp)
    for slot, (now, was) in enumerate(zip(run.memory, case.memory, strict=True)):
        if slot == case.slot:
            assert_within(now, *of_kept, ulp)
            now.copy_(was)  # what lies between its elements is left
        assert torch.equal(bits(whole(now)), bits(whole(was)))

"""The fused operations by Triton and by CUDA C++, beside a copy: GB/s and the share of the copy.
Attention, which is bound by its products, beside PyTorch's own.

    python -m gpu.operations --out FOLDER [--dry] [--budget SECONDS]

Inputs that no cache holds, replayed as CUDA graphs. The copy is ``x.clone()`` of the operation's
first input, in the same rounds.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import fastdiff
from fastdiff.ops.dispatch import OPERATIONS, problem
from gpu.phase import Phase, race
from harness import contenders, floors, peers_eager, shapes
from harness.timing import Contender, Inputs, input_sets, normal

BATCH, IMAGES = 64, 512
NORMS = ((128, 32), (384, 64), (128, 128))  # channels, size
SIZES = (32, 256)  # of images
HEADS = ((256, 512), (256, 256))  # tokens, head_dim
STEP = 500  # a row that draws noise
COPY, SDPA = "copy", "sdpa"


@dataclass(frozen=True)
class Measured:
    """``call(*inputs())``, the bytes that it has to move, and PyTorch's own call."""

    op: str
    shape: str
    dtype: torch.dtype
    layout: str
    call: Callable[..., Any]
    inputs: Callable[[], Inputs]
    size_bytes: int
    rival: Callable[..., Any] | None = None

    def fields(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        names = {"op": self.op, "shape": self.shape, "dtype": dtype, "layout": self.layout}
        return {**names, "bytes": self.size_bytes}


def main(argv: Sequence[str] | None = None) -> int:
    phase = Phase.begin("operations", __doc__, argv)
    for measured in measurements(phase.device, phase.dry):
        fields = measured.fields()
        if not phase.time_left(**fields):
            break
        with phase.attempt(**fields):
            race_operation(phase, measured)
    return phase.ended()


def race_operation(phase: Phase, measured: Measured) -> None:
    """The copy goes first in every round, so that each row has its share."""
    inputs = input_sets(measured.inputs(), measured.inputs, phase.device)
    copied = 2 * inputs[0][0].nbytes
    bandwidth: float | None = None

    def figures(name: str, seconds: float) -> dict[str, Any]:
        nonlocal bandwidth
        if name == COPY:
            bandwidth = copied / seconds
            return {"gbps": bandwidth / 1e9}
        rate = measured.size_bytes / seconds
        share = None if bandwidth is None else 100 * rate / bandwidth
        return {"gbps": rate / 1e9, "percent_of_copy": share}

    makers = {COPY: contenders.copy} | {
        name: partial(Contender, name, measured.call, name)
        for name in serving(measured, inputs[0][0])
    }
    if measured.rival is not None:
        makers[SDPA] = partial(Contender, SDPA, measured.rival)
    race(phase, makers, figures, inputs=inputs, **measured.fields())


def serving(measured: Measured, x: torch.Tensor) -> list[str]:
    operation = OPERATIONS[measured.op]
    backends = ("native", "reference") if x.is_cpu else ("triton", "cuda")
    return [name for name in backends if not problem(operation, name, x.device, x.dtype)]


def measurements(device: torch.device, dry: bool) -> Iterator[Measured]:
    """The most wanted first: the norms of a U-Net in bfloat16, then one step's arithmetic."""
    sizes, batch = (((32, 4),), 2) if dry else (NORMS, BATCH)
    for channels, size in sizes:
        yield norm(device, batch, channels, size, torch.bfloat16, "channels_last")
    sizes, batch = ((8,), 2) if dry else (SIZES, IMAGES)
    for size in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            yield noising(device, batch, size, dtype)
            yield step(device, batch, size, dtype)
    for tokens, head_dim in ((16, 32),) if dry else HEADS:
        yield attention(device, 2 if dry else BATCH, tokens, head_dim)
    if not dry:
        for channels, size in NORMS:
            yield norm(device, BATCH, channels, size, torch.bfloat16, "NCHW")
            yield norm(device, BATCH // 2, channels, size, torch.float32, "channels_last")


def norm(
    device: torch.device, batch: int, channels: int, size: int, dtype: torch.dtype, layout: str
) -> Measured:
    make = partial(normal, dtype=dtype, device=device)

    def inputs() -> Inputs:
        x = make(batch, channels, size, size, layout=layout)
        return x, make(channels, offset=1), make(channels, offset=2)

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return fastdiff.ops.group_norm_silu(x, shapes.GROUPS, weight, bias)

    moved = 2 * batch * channels * size**2 * dtype.itemsize
    shape = f"{batch}x{channels}@{size}"
    return Measured("group_norm_silu", shape, dtype, layout, call, inputs, moved)


def noising(device: torch.device, batch: int, size: int, dtype: torch.dtype) -> Measured:
    process = peers_eager.Process(device=device)
    t = torch.linspace(0, 999, batch, device=device).long()
    tables = (process.sqrt_alphas_cumprod, process.sqrt_one_minus_alphas_cumprod)

    def inputs() -> Inputs:
        return (normal(batch, 3, size, size, dtype=dtype, device=device),)

    def call(x: torch.Tensor) -> Any:
        return fastdiff.ops.q_sample(x, t, *tables, seed=1, return_noise=True)

    moved = floors.q_sample(inputs()[0], returns_drawn=True)
    return Measured("q_sample", f"{batch}x3@{size}", dtype, "NCHW", call, inputs, moved)


def step(device: torch.device, batch: int, size: int, dtype: torch.dtype) -> Measured:
    table = fastdiff.StepTable.from_process(fastdiff.create_diffusion(steps=1000)).to(device)
    make = partial(normal, batch, 3, size, size, dtype=dtype, device=device)

    def inputs() -> Inputs:
        return make(), make(offset=1)

    def call(x: torch.Tensor, output: torch.Tensor) -> Any:
        return fastdiff.ops.posterior_step(x, output, table, STEP, seed=1)

    moved = floors.posterior_step(*inputs())
    return Measured("posterior_step", f"{batch}x3@{size}", dtype, "NCHW", call, inputs, moved)


def attention(device: torch.device, batch: int, tokens: int, head_dim: int) -> Measured:
    """One head, on the token-major projection that the U-Net makes."""
    shape, dtype = (batch, 3 * head_dim, tokens), torch.bfloat16

    def inputs() -> Inputs:
        return (normal(*shape, dtype=dtype, device=device, layout="channels_last"),)

    def call(qkv: torch.Tensor) -> torch.Tensor:
        return fastdiff.ops.attention(qkv, 1)

    def rival(qkv: torch.Tensor) -> torch.Tensor:
        return peers_eager.attention(qkv, 1, "heads_first")

    moved = 4 * batch * head_dim * tokens * dtype.itemsize
    name = f"{batch}x1x{tokens}x{head_dim}"
    return Measured("attention", name, dtype, "token-major", call, inputs, moved, rival)


if __name__ == "__main__":
    sys.exit(main())

"""The fused operations by Triton and by CUDA C++, beside a copy: GB/s and the share of the copy.
Attention, which is bound by its products, beside PyTorch's own.

    python -m gpu.operations --out FOLDER [--dry] [--budget SECONDS]

Inputs that no cache holds, replayed as CUDA graphs. The copy is ``x.clone()`` of the operation's
first input, in the same rounds. Of what training adds, the norm's backward: attention's, whose goal
is a share of PyTorch's own forward and backward, is bench_attention's.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import fastdiff
from fastdiff.ops import backends
from fastdiff.ops.dispatch import OPERATIONS, problem
from gpu.phase import Phase, race
from harness import contenders, floors, peers_eager, shapes, summary
from harness.timing import Contender, Inputs, input_sets, normal

BATCH, IMAGES = 64, 512
NORMS = ((128, 32), (384, 64), (128, 128))  # channels, size
SIZES = (32, 256)  # of images
HEADS = ((256, 512), (256, 256))  # tokens, head_dim
EPS = 1e-5
STEP = 500  # a row that draws noise
COPY, SDPA = "copy", "sdpa"


@dataclass(frozen=True)
class Measured:
    """``call(*inputs())``, the bytes that it has to move, and PyTorch's own call, with how many
    times faster than that it should be."""

    op: str
    shape: str
    dtype: torch.dtype
    layout: str
    call: Callable[..., Any]
    inputs: Callable[[], Inputs]
    size_bytes: int
    direction: str = "forward"
    rival: Callable[..., Any] | None = None
    target: float | None = None

    def fields(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        names = {"op": self.op, "direction": self.direction, "shape": self.shape, "dtype": dtype}
        targets = {} if self.target is None else {SDPA: self.target}
        return {**names, "layout": self.layout, "bytes": self.size_bytes, "targets": targets}


def main(argv: Sequence[str] | None = None) -> int:
    phase = Phase.begin("operations", __doc__, argv)
    wanted = list(measurements(phase.device, phase.dry))
    phase.plan(measured.fields() for measured in wanted)
    for measured in wanted:
        fields = measured.fields()
        if phase.time_left(**fields):
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
    kernels = ("native",) if x.is_cpu else ("triton", "cuda")
    return [name for name in kernels if not problem(operation, name, x.device, x.dtype)]


def measurements(device: torch.device, dry: bool) -> Iterator[Measured]:
    """The most wanted first: the norms of a U-Net in bfloat16, then one step's arithmetic."""
    half, full = torch.bfloat16, torch.float32
    norms, batch = (((32, 4),), 2) if dry else (NORMS, BATCH)
    sizes, images = ((8,), 2) if dry else (SIZES, IMAGES)
    for make in (norm, norm_backward):
        for channels, size in norms:
            yield make(device, batch, channels, size, half, "channels_last")
    for size in sizes:
        for dtype in (full, half):
            yield noising(device, images, size, dtype)
            yield step(device, images, size, dtype)
    for tokens, head_dim in ((16, 32),) if dry else HEADS:
        yield attention(device, batch, tokens, head_dim)
    for dtype in (full, half):  # each a kernel of its own
        yield noising(device, images, sizes[-1], dtype, returns_noise=False)
        yield step(device, images, sizes[-1], dtype, returns_x_start=False)
        yield step(device, images, sizes[-1], dtype, learned=True)
    yield rms_norm(device, batch, *norms[0], half, "channels_last")
    for channels, size in () if dry else norms:  # other layouts of the same kernels
        yield norm(device, batch, channels, size, half, "NCHW")
        yield norm_backward(device, batch, channels, size, half, "NCHW")
        yield norm(device, batch // 2, channels, size, full, "channels_last")


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


def norm_backward(
    device: torch.device, batch: int, channels: int, size: int, dtype: torch.dtype, layout: str
) -> Measured:
    """The operator that autograd calls: autograd itself would launch it on the forward's stream,
    where no graph is captured."""
    forward = norm(device, batch, channels, size, dtype, layout)
    backward = torch.ops.fastdiff.group_norm_silu_backward

    def inputs() -> Inputs:
        x, weight, bias = forward.inputs()
        dy = normal(*x.shape, dtype=dtype, device=device, layout=layout, offset=3)
        groups = x.float().reshape(batch, shapes.GROUPS, -1)
        variance, mean = torch.var_mean(groups, dim=2, correction=0)
        return dy, torch.stack([mean, (variance + EPS).rsqrt()]), x, weight, bias

    def call(*tensors: torch.Tensor) -> Any:
        no_film, no_add = (None, None), None
        options = (shapes.GROUPS, EPS, True, backends.named(), True)
        return backward(*tensors, *no_film, no_add, *options)

    moved = forward.size_bytes // 2 * 3
    return replace(forward, call=call, inputs=inputs, size_bytes=moved, direction="backward")


def rms_norm(
    device: torch.device, batch: int, channels: int, size: int, dtype: torch.dtype, layout: str
) -> Measured:
    make = partial(normal, dtype=dtype, device=device)

    def inputs() -> Inputs:
        return make(batch, channels, size, size, layout=layout), make(channels, offset=1)

    moved = 2 * batch * channels * size**2 * dtype.itemsize
    call, shape = fastdiff.ops.rms_norm_silu, f"{batch}x{channels}@{size}"
    return Measured("rms_norm_silu", shape, dtype, layout, call, inputs, moved)


def noising(
    device: torch.device, batch: int, size: int, dtype: torch.dtype, *, returns_noise: bool = True
) -> Measured:
    process = peers_eager.Process(device=device)
    t = torch.linspace(0, 999, batch, device=device).long()
    tables = (process.sqrt_alphas_cumprod, process.sqrt_one_minus_alphas_cumprod)

    def inputs() -> Inputs:
        return (normal(batch, 3, size, size, dtype=dtype, device=device),)

    def call(x: torch.Tensor) -> Any:
        return fastdiff.ops.q_sample(x, t, *tables, seed=1, return_noise=returns_noise)

    moved = floors.q_sample(inputs()[0], returns_drawn=returns_noise)
    shape = f"{batch}x3@{size}{'' if returns_noise else ' x_t alone'}"
    return Measured("q_sample", shape, dtype, "NCHW", call, inputs, moved)


def step(
    device: torch.device,
    batch: int,
    size: int,
    dtype: torch.dtype,
    *,
    learned: bool = False,
    returns_x_start: bool = True,
) -> Measured:
    """``learned``: the output holds the variance too."""
    process = fastdiff.create_diffusion(steps=1000, learn_sigma=learned)
    table = fastdiff.StepTable.from_process(process).to(device)
    make = partial(normal, dtype=dtype, device=device)

    def inputs() -> Inputs:
        output = make(batch, 6 if learned else 3, size, size, offset=1)
        return make(batch, 3, size, size), output

    def call(x: torch.Tensor, output: torch.Tensor) -> Any:
        how = {"seed": 1, "return_x_start": returns_x_start}
        return fastdiff.ops.posterior_step(x, output, table, STEP, **how)

    moved = floors.posterior_step(*inputs(), learned=learned, returns_x_start=returns_x_start)
    variant = (" learned" if learned else "") + ("" if returns_x_start else " x_prev alone")
    shape = f"{batch}x3@{size}{variant}"
    return Measured("posterior_step", shape, dtype, "NCHW", call, inputs, moved)


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
    made = Measured("attention", name, dtype, "token-major", call, inputs, moved)
    return replace(made, rival=rival, target=summary.sdpa_target(head_dim))


if __name__ == "__main__":
    sys.exit(main())

"""A few small calls of every operation, each with its answer in float64.

Small, so that all backends take them in seconds; between them they have both layouts, a half and a
full precision, each way of modulating a norm, and the head sizes that take different kernels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff.methods.table import COLUMNS, StepTable
from fastdiff.ops.attention.reference import attention as attention_equation
from fastdiff.ops.group_norm_silu.reference import group_norm_silu as group_norm_equation
from fastdiff.ops.posterior_step.reference import posterior_step as step_equation
from fastdiff.ops.q_sample.reference import q_sample as q_sample_equation
from fastdiff.ops.residual_norm.reference import residual_norm as residual_norm_equation
from fastdiff.ops.rms_norm_silu.reference import rms_norm_silu as rms_norm_equation

HALF, FULL = torch.bfloat16, torch.float32
STEP = 40  # a row that draws noise
KEEPING = StepTable.from_rows(  # reads two slots of memory and writes the first of them
    [{"timesteps": 0.0, "a": 1.0, "b": -0.5, "c": 0.75, "d": 0.5, "e0": -0.25, "e1": 0.125,
      "slot": 0.0, "k": 1.0, "q": -0.5}]
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """``call(*tensors)``, and ``truth``, the same of float64 tensors, written as the papers do."""

    op: str
    shape: str
    tensors: tuple[Tensor, ...]
    call: Callable[..., Any]
    truth: Callable[..., Any]
    is_differentiable: bool = False  # by kernels

    @property
    def dtype(self) -> str:
        return str(self.tensors[0].dtype).removeprefix("torch.")


def cases(device: torch.device, dry: bool) -> Iterator[Case]:
    """All of them, made as they are asked for. ``dry``: smaller, for Triton's interpreter."""
    made = partial(_normal, device=device, generator=torch.Generator().manual_seed(0))
    yield from _elementwise(made, device, dry)
    yield from _group_norms(made, dry)
    yield from _residual_norms(made, dry)
    yield from _rms_norms(made, dry)
    yield from _attentions(made, dry)  # last: their kernels take longest to compile


def _group_norms(made: Callable[..., Tensor], dry: bool) -> Iterator[Case]:
    """Alone, with FiLM, and with an embedding; the last is the largest that the presets have at
    that resolution."""
    sizes = [(2, 64, 8, FULL), (4, 128, 32, HALF), (2, 128, 128, HALF)]
    groups = 32
    if dry:  # the interpreter takes its time for each group
        sizes, groups = [(2, 8, 4, FULL), (1, 8, 4, HALF), (2, 8, 4, HALF)], 4
    for (n, channels, size, dtype), form in zip(sizes, ("film", "silu", "add"), strict=True):
        x = made(n, channels, size, size, dtype=dtype, last=form != "film")
        parameters = (made(channels), made(channels))
        more = {"film": 2, "silu": 0, "add": 1}[form]
        rows = tuple(made(n, channels, dtype=dtype) for _ in range(more))
        names = ("scale", "shift") if form == "film" else ("add",)

        def call(function, x, weight, bias, *rows, names=names):
            return function(x, groups, weight, bias, **dict(zip(names, rows, strict=False)))

        yield Case(
            "group_norm_silu",
            f"{form} {n}x{channels}@{size}",
            (x, *parameters, *rows),
            partial(call, fastdiff.ops.group_norm_silu),
            partial(call, group_norm_equation),
            is_differentiable=True,
        )


def _residual_norms(made: Callable[..., Tensor], dry: bool) -> Iterator[Case]:
    """Of one block's end and the next one's norm: with a second tensor, one group in both of them,
    and the largest that is read once."""
    sizes = [(2, 128, 64, 16, FULL), (4, 256, 128, 32, HALF)]
    groups = 32
    if dry:
        sizes, groups = [(1, 8, 4, 4, FULL), (1, 8, 4, 4, HALF)], 3
    for n, channels, more, size, dtype in sizes:
        x, residual, second = (
            made(n, c, size, size, dtype=dtype, last=dtype == HALF)
            for c in (channels, channels, more)
        )
        rows = (made(channels), made(channels + more), made(channels + more))

        def call(function, x, residual, second, add, weight, bias):
            given = {"residual": residual, "add": add, "second": second}
            return function(x, groups, weight, bias, **given)

        yield Case(
            "residual_norm",
            f"{n}x{channels}+{more}@{size}",
            (x, residual, second, *rows),
            partial(call, fastdiff.ops.residual_norm),
            partial(call, residual_norm_equation),
        )


def _rms_norms(made: Callable[..., Tensor], dry: bool) -> Iterator[Case]:
    sizes = [(2, 16, 4, FULL), (2, 8, 4, HALF)] if dry else [(2, 64, 64, FULL), (4, 256, 16, HALF)]
    for n, channels, size, dtype in sizes:
        x = made(n, channels, size, size, dtype=dtype, last=dtype == HALF)
        film = (made(n, channels, dtype=dtype), made(n, channels, dtype=dtype))

        def call(function, x, weight, scale, shift):
            return function(x, weight, scale=scale, shift=shift)

        yield Case(
            "rms_norm_silu",
            f"film {n}x{channels}@{size}",
            (x, made(channels), *film),
            partial(call, fastdiff.ops.rms_norm_silu),
            partial(call, rms_norm_equation),
        )


def _attentions(made: Callable[..., Tensor], dry: bool) -> Iterator[Case]:
    """Heads, tokens and head_dim of a CIFAR network, one of ImageNet's and the 256² one."""
    sizes = [(4, 64, 64, FULL, False), (1, 256, 256, HALF, True), (1, 64, 512, HALF, True)]
    if dry:
        sizes = [(2, 16, 16, FULL, False), (1, 16, 32, HALF, True)]
    for heads, tokens, head_dim, dtype, token_major in sizes:
        width = 3 * heads * head_dim
        qkv = made(2, width, tokens, dtype=dtype)
        if token_major:
            qkv = qkv.transpose(1, 2).contiguous().transpose(1, 2)
        yield Case(
            "attention",
            f"{heads}x{tokens}x{head_dim} {'token' if token_major else 'channel'}-major",
            (qkv,),
            partial(fastdiff.ops.attention, num_heads=heads),
            partial(attention_equation, num_heads=heads),
            is_differentiable=True,
        )


def _elementwise(made: Callable[..., Tensor], device: torch.device, dry: bool) -> Iterator[Case]:
    """The noise is given: what is drawn has tests of its own, bit by bit."""
    process = fastdiff.create_diffusion(steps=100)
    table = StepTable.from_process(process).to(device)
    tables = [torch.linspace(a, b, 10, device=device) for a, b in ((1, 0.1), (0.1, 1))]
    for n, size, dtype in ((3, 8, FULL), (2, 8, HALF)) if dry else ((3, 32, FULL), (8, 64, HALF)):
        x, y, z = (made(n, 3, size, size, dtype=dtype, last=dtype == HALF) for _ in range(3))
        t = torch.arange(n, device=device)

        def noised(x, noise, t=t):
            return fastdiff.ops.q_sample(x, t, *tables, noise=noise)[0]

        def noised_truth(x, noise, t=t):
            return q_sample_equation(x, t, *(v.double() for v in tables), noise)

        def stepped(x, output, noise):
            return fastdiff.ops.posterior_step(x, output, table, STEP, noise=noise)

        def stepped_truth(x, output, noise):
            row = dict(zip(COLUMNS, table.packed[STEP].double().unbind(), strict=True))
            return step_equation(x, output, row, z=noise)

        yield Case("q_sample", f"{n}x3@{size}", (x, z), noised, noised_truth)
        yield Case("posterior_step", f"{n}x3@{size}", (x, y, z), stepped, stepped_truth)
        yield _keeping(tuple(made(n, 3, size, size, dtype=dtype) for _ in range(5)))


def _keeping(tensors: tuple[Tensor, ...]) -> Case:
    """A step with memory, in place, that another network guides: x_prev and what is kept."""
    keeping = KEEPING.to(tensors[0].device)

    def stepped(x, output, other, first, second):
        memory, given = [first.clone(), second.clone()], {"guidance_scale": 2.0}
        x_prev, _ = fastdiff.ops.posterior_step(
            x, output, keeping, 0, unconditional=other, memory=memory, **given
        )
        return torch.stack([x_prev, memory[0]])

    def truth(x, output, other, *memory):
        row = dict(zip(COLUMNS, keeping.packed[0].double().unbind(), strict=True))
        guided = other + 2.0 * (output - other)
        x_prev, x_start = step_equation(x, guided, row, memory=memory)
        return torch.stack([x_prev, row["k"] * x_start + row["q"] * x])

    n, _, size, _ = tensors[0].shape
    return Case("posterior_step", f"memory {n}x3@{size}", tensors, stepped, truth)


def _normal(
    *shape: int,
    device: torch.device,
    generator: torch.Generator,
    dtype: torch.dtype = FULL,
    last: bool = False,
) -> Tensor:
    """Drawn on the CPU, so that every machine has the same numbers."""
    x = torch.randn(shape, generator=generator)
    memory = torch.channels_last if last else torch.contiguous_format
    return x.to(device, dtype).contiguous(memory_format=memory)

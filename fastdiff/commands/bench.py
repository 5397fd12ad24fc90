"""``fastdiff bench``: the fused operations against eager PyTorch on this machine, in a minute.

A first look at a handful of shapes, without a clone. The comparison over every shape, with
torch.compile and the share of the hardware's limit, is benchmarks/ of the repository.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import ops
from fastdiff.checks import check_device
from fastdiff.errors import InputError
from fastdiff.methods.table import StepTable
from fastdiff.ops.convolution.packed import pack
from fastdiff.ops.dispatch import OPERATIONS
from fastdiff.ops.norm_coefficients.reference import norm_coefficients
from fastdiff.process.gaussian import create_diffusion

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIN_ROUNDS, MAX_ROUNDS = 5, 101
STEP = 500  # a row of the table that draws noise


@dataclass
class Case:
    op: str
    shape: str
    ours: Callable[[], object]
    eager: Callable[[], object]
    choose: Callable[[], object]
    bytes: int  # each input read and each output written once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of storage")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="where to run")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each operation and shape")


def run(args: argparse.Namespace) -> int:
    device = check_device(args.device)
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device is {args.device!r}; expected cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"there is no device {args.device!r} here")
    if args.batch < 1 or not args.seconds > 0:
        raise InputError("--batch and --seconds must be positive")
    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    print(f"{args.dtype}, batch {args.batch}, {device}{threads}, torch {torch.__version__}")
    print(f"{'operation':17} {'shape':12} {'eager':>10} {'fastdiff':>10} {'faster':>7} {'GB/s':>7}")
    with torch.no_grad():
        for case in cases(args.batch, DTYPES[args.dtype], device):
            eager, ours = race((case.eager, case.ours), device, args.seconds)
            print(
                f"{case.op:17} {case.shape:12} {statistics.median(eager) * 1e3:7.3f} ms "
                f"{statistics.median(ours) * 1e3:7.3f} ms "
                f"{statistics.median(e / o for e, o in zip(eager, ours, strict=True)):6.2f}x "
                f"{case.bytes / statistics.median(ours) / 1e9:7.1f}  {case.choose()}"
            )
    return 0


def race(
    calls: tuple[Callable[[], object], ...], device: torch.device, seconds: float
) -> list[list[float]]:
    """Seconds per call of each, turn by turn so that both meet the same machine."""

    def turn(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for call in calls:
        turn(call)
    once = sum(turn(call) for call in calls)
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / once)))
    turns = [[turn(call) for call in calls] for _ in range(rounds)]
    return [list(times) for times in zip(*turns, strict=True)]


def cases(batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Shapes of the CIFAR-10, ImageNet-64 and LSUN networks; inside them in channels_last."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    for channels, size in ((256, 8), (128, 32), (384, 64)):
        h = normal(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
        norm = (h, 32, normal(channels), normal(channels))
        yield _case("group_norm_silu", f"{channels}@{size}", _eager_norm, norm, {}, 2)
        rms = (h, normal(1, channels, 1, 1))
        yield _case("rms_norm_silu", f"{channels}@{size}", _eager_rms_norm, rms, {}, 2)
        residual = {"residual": normal(*h.shape).contiguous(memory_format=torch.channels_last)}
        yield _case("residual_norm", f"{channels}@{size}", _eager_residual, norm, residual, 4)
    yield from _convolutions(batch, dtype, device)
    diffusion = create_diffusion(steps=1000)
    signal, noise = (
        torch.from_numpy(table).float().to(device)
        for table in (diffusion.sqrt_alphas_cumprod, diffusion.sqrt_one_minus_alphas_cumprod)
    )
    t = torch.full((batch,), STEP, device=device)
    steps = StepTable.from_process(diffusion).to(device)
    for size in (32, 256):
        x, output = normal(batch, 3, size, size), normal(batch, 3, size, size)
        forward, reverse = (x, t, signal, noise), (x, output, steps, STEP)
        yield _case("q_sample", f"3@{size}", _eager_q_sample, forward, {"seed": 1}, 3)
        yield _case("posterior_step", f"3@{size}", _eager_step, reverse, {"seed": 1}, 4)
    for heads, tokens, width in ((4, 64, 64), (1, 256, 256), (1, 256, 512)):
        qkv = normal(batch, tokens, 3 * heads * width).transpose(1, 2)
        shape = f"{heads}x{tokens}x{width}"
        yield _case("attention", shape, _eager_attention, (qkv, heads), {}, 4 / 3)


def _convolutions(batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """A residual block's second half, and what its norm comes to."""
    for channels, size in ((256, 8), (128, 32)):
        x = torch.randn(batch, channels, size, size, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        moments = torch.rand(batch, 2, channels, device=device)
        norm = (moments, 32, *torch.randn(2, channels, device=device))
        yield _case("norm_coefficients", f"{channels}@{size}", norm_coefficients, norm, {}, 2)
        weight = torch.randn(channels, channels, 3, 3, device=device) / (9 * channels) ** 0.5
        kernel = pack(weight, dtype) if device.type == "cpu" else weight
        around: dict[str, Any] = {
            "coefficients": ops.norm_coefficients(*norm),
            "activation": "silu",
            "residual": x,
            "padding": (1, 1),
            "moments": True,
        }
        plain = weight.to(dtype, memory_format=torch.channels_last)
        yield Case(
            "convolution",
            f"{channels}@{size}",
            partial(ops.convolution, x, kernel, **around),
            partial(_eager_convolution, x, plain),
            partial(_chosen, "convolution", x, weight),
            3 * x.nbytes + plain.nbytes,
        )


def _chosen(op: str, *args: Any, **kwargs: Any) -> str:
    return OPERATIONS[op].choose(*args, **kwargs).backend


def _case(op: str, shape: str, eager: Callable, args: tuple, kwargs: dict, passes: float) -> Case:
    function = getattr(ops, op)
    return Case(
        op,
        shape,
        lambda: function(*args, **kwargs),
        lambda: eager(*args, **{k: v for k, v in kwargs.items() if isinstance(v, Tensor)}),
        partial(_chosen, op, *args, **kwargs),
        int(passes * args[0].nbytes),
    )


def _eager_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias))


def _eager_convolution(x: Tensor, weight: Tensor) -> Tensor:
    return x + F.conv2d(F.silu(F.group_norm(x, 32)), weight, padding=1)


def _eager_residual(x: Tensor, *norm: Any, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, F.silu(F.group_norm(total, *norm))


def _eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.silu(F.normalize(x, dim=1) * weight * x.shape[1] ** 0.5)


def _eager_q_sample(x: Tensor, t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    rows = (table[t].view(-1, 1, 1, 1) for table in (signal, sigma))
    return (next(rows) * x + next(rows) * torch.randn_like(x)).to(x.dtype)


def _eager_step(x: Tensor, output: Tensor, table: StepTable, step: int) -> tuple[Tensor, Tensor]:
    a, b, c, d = (getattr(table, name)[step] for name in "abcd")
    x_start = (a * x + b * output).clamp(-1, 1)
    return c * x_start + d * x + table.sigma[step] * torch.randn_like(x), x_start


def _eager_attention(qkv: Tensor, heads: int) -> Tensor:
    n, width, tokens = qkv.shape
    q, k, v = qkv.view(n, heads, 3, -1, tokens).transpose(3, 4).unbind(2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width // 3)

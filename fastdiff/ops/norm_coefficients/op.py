"""A group norm as a scale and a shift per sample and channel."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import native
from fastdiff.ops.checks import check_pair, check_tensor, refusal
from fastdiff.ops.differentiable import Kernel, Launch
from fastdiff.ops.dispatch import OPERATIONS, Operation
from fastdiff.ops.layouts import Maybe, row_stride
from fastdiff.ops.native import address
from fastdiff.ops.norm_coefficients import reference

OP = "norm_coefficients"
OPERATION = OPERATIONS[OP] = Operation(OP, ("native",))


def norm_coefficients(
    moments: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    second: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """A and B of ``A·x + B = norm(x)·(1 + scale) + shift`` with the group norm of x.

    Args:
        moments: (N, 2, C) float32, the mean and the biased variance of x's channels, as
            ``convolution`` answers them.
        groups: divides the channels of both sources.
        weight: (C + C2,).
        bias: (C + C2,).
        eps: added to the variance.
        second: (N, 2, C2), the moments of channels after those.
        scale: (N, C + C2), with ``shift`` or not at all.
        shift: (N, C + C2).

    Returns:
        (N, 2, C + C2) float32 (float64 for float64): A and B.

    Gradients are the reference's alone. Raises InputError for shapes, dtypes or devices that do not
    fit.

    Source: Wu & He 2018, equation 1; FiLM as in Nichol & Dhariwal 2021, section 3.
    """
    fits = isinstance(moments, Tensor) and moments.dim() == 3 and moments.shape[1] == 2
    if not fits or moments.dtype not in (torch.float32, torch.float64):
        raise refusal(OP, "moments", moments, "(N, 2, C) in float32 or float64")
    n, _, channels = moments.shape
    if second is not None:
        check_tensor(OP, "second", second, moments, (n, 2, second.shape[-1]))
        channels += second.shape[-1]
    if groups < 1 or channels % groups:
        raise InputError(f"{OP}: {groups} groups do not divide {channels} channels")
    check_tensor(OP, "weight", weight, moments, (channels,))
    check_tensor(OP, "bias", bias, moments, (channels,))
    check_pair(OP, ("scale", "shift"), scale, shift, moments, (n, channels))
    backend = OPERATION.choose(moments, second, weight, bias, scale, shift).backend
    if backend == "reference":
        film = {"scale": scale, "shift": shift}
        return reference.norm_coefficients(
            moments, groups, weight, bias, eps, second=second, **film
        )
    return _kernel(Arguments(moments, second, weight, bias, scale, shift, groups, eps))[0]


class Arguments(NamedTuple):
    moments: Tensor
    second: Maybe
    weight: Tensor
    bias: Tensor
    scale: Maybe
    shift: Maybe
    groups: int
    eps: float


def _readable(call: Arguments) -> Arguments:
    moments, second, weight, bias = (
        None if v is None else v.float().contiguous() for v in call[:4]
    )
    scale, shift = call.scale, call.shift
    if scale is not None and shift is not None:
        fits = scale.stride() == shift.stride() and scale.stride(1) == 1
        if not fits or {scale.dtype, shift.dtype} != {torch.float32}:
            scale, shift = scale.float().contiguous(), shift.float().contiguous()
    made: dict[str, Any] = {"moments": moments, "second": second, "weight": weight, "bias": bias}
    return call._replace(**made, scale=scale, shift=shift)


def _allocate(call: Arguments) -> tuple[Tensor]:
    n, _, channels = call.moments.shape
    channels += 0 if call.second is None else call.second.shape[2]
    return (call.moments.new_empty(n, 2, channels),)


def _plan(call: Arguments) -> Any:
    n, _, channels = call.moments.shape
    shape = native.library().NormCoefficientsShape(
        samples=n,
        channels=channels,
        second_channels=0 if call.second is None else call.second.shape[2],
        groups=call.groups,
        eps=call.eps,
        film_stride=row_stride(call.scale),
    )
    return Launch(partial(_prepared, shape))


def _prepared(shape: Any, *tensors: Maybe) -> Callable[[], None]:
    run = partial(native.library().norm_coefficients_cpu, shape, *map(address, tensors))
    return lambda: run(torch.get_num_threads())


_kernel = Kernel(OP, Arguments, _allocate, _plan, readable=_readable)

bound = _kernel.bound

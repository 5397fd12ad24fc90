"""RMS norm over the channels + FiLM + SiLU in one call."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.backends import KERNEL_DTYPES
from fastdiff.ops.checks import check_activation, check_pair, check_tensor, check_x, refusal
from fastdiff.ops.differentiable import Kernel
from fastdiff.ops.dispatch import OPERATIONS, Operation
from fastdiff.ops.layouts import Maybe, in_kernels_layout, norm_shape, rows
from fastdiff.ops.native import code
from fastdiff.ops.rms_norm_silu import reference

OP = "rms_norm_silu"
OPERATION = OPERATIONS[OP] = Operation(OP, ("native", "triton"))


def rms_norm_silu(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-12,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """``silu(x / max(‖x‖, eps)·√C·weight·(1 + scale) + shift)``, ‖x‖ over each position's channels.

    Args:
        x: (N, C, *spatial), any number of spatial dimensions and any layout; the result has both.
        weight: C elements in any shape, (C,) and (1, C, 1, 1) among them.
        eps: the least norm to divide by.
        scale: (N, C) or (N, C, 1, ...), or None, like shift, for no FiLM.
        shift: likewise, given exactly when scale is.
        activation: ``"silu"``, or None for the norm (and FiLM) alone.

    Returns:
        (N, C, *spatial) in the dtype of ``x``, also under autocast; the arithmetic is float32.

    Gradients are the reference's alone. Raises InputError for shapes, dtypes, devices or names that
    do not fit.

    Source: Zhang & Sennrich 2019, equation 4, over the channels as denoising-diffusion-pytorch has
    it; FiLM as in Nichol & Dhariwal 2021, section 3.
    """
    check_x(OP, x)
    check_activation(OP, activation)
    backend = OPERATION.choose(x, weight, scale, shift).backend
    call = Arguments(x, weight, scale, shift, float(eps), activation is not None, backend)
    if backend == "reference":
        _check(call)
        film: dict[str, Any] = {"scale": scale, "shift": shift, "activation": activation}
        return reference.rms_norm_silu(x, weight, eps=eps, **film)
    return _kernel(call)[0]


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    scale: Maybe
    shift: Maybe
    eps: float
    silu: bool
    backend: str


def _check(call: Arguments) -> None:
    """InputError for tensors that do not fit each other."""
    x, weight = call.x, call.weight
    rows = x.shape[:2]
    if not isinstance(weight, Tensor) or weight.numel() != rows[1]:
        raise refusal(OP, "weight", weight, f"{rows[1]} elements, one for each channel of x")
    check_tensor(OP, "weight", weight, x, weight.shape)
    broadcast = rows + (1,) * (x.dim() - 2)
    check_pair(OP, ("scale", "shift"), call.scale, call.shift, x, rows, broadcast)


def _readable(call: Arguments) -> Arguments:
    """With copies of what no kernel reads as it stands (strange strides, mixed and wide dtypes)."""
    x, weight = call.x, call.weight
    if weight.dtype not in KERNEL_DTYPES:
        weight = weight.float()
    x = in_kernels_layout(x, x)
    scale, shift = rows(call.scale, call.shift)
    return call._replace(x=x, weight=weight.contiguous(), scale=scale, shift=shift)


def _plan(call: Arguments) -> Any:
    """What fills y for calls like this one."""
    x, weight, scale, shift, eps, silu, backend = call
    if backend == "triton":
        from fastdiff.kernels import rms_norm_silu as kernels

        return kernels.forward(x, eps, scale, shift, silu)
    shape = native.library().RmsNormShape(
        **norm_shape(x, scale, shift), silu=silu, eps=eps, weight_dtype=code(weight)
    )
    return lambda *tensors: native.launch_on(OP, backend, shape, tensors)


_kernel = Kernel(OP, Arguments, lambda call: (torch.empty_like(call.x),), _plan, _check, _readable)

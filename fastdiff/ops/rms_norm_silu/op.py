"""RMS norm over the channels + FiLM + SiLU in one call."""

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.ops import checks, dispatch, native
from fastdiff.ops.backends import KERNEL_DTYPES
from fastdiff.ops.differentiable import Kernel
from fastdiff.ops.dispatch import OPERATIONS, Choice, Operation
from fastdiff.ops.layouts import Maybe, address, code, in_kernels_layout, norm_shape, rows
from fastdiff.ops.plans import plan_of
from fastdiff.ops.rms_norm_silu import reference

OP = "rms_norm_silu"


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
    film: dict[str, Any] = {"scale": scale, "shift": shift, "activation": activation}
    backend = choose(x, weight, **film).backend
    if backend == "reference":
        return reference.rms_norm_silu(x, weight, eps=eps, **film)
    silu = activation is not None
    return _kernel(Arguments(x, weight, scale, shift, float(eps), silu, backend))[0]


def choose(
    x: Tensor, weight: Tensor, *, scale: Maybe = None, shift: Maybe = None,
    activation: str | None = "silu", **_: Any,
) -> Choice:  # fmt: skip
    """Which backend serves this call, once checked, and why (``fastdiff.explain``)."""
    checks.check_x(OP, x)
    rows = x.shape[:2]
    if not isinstance(weight, Tensor) or weight.numel() != rows[1]:
        raise checks.refusal(OP, "weight", weight, f"{rows[1]} elements, one for each channel of x")
    checks.check_tensor(OP, "weight", weight, x, weight.shape)
    broadcast = rows + (1,) * (x.dim() - 2)
    checks.check_pair(OP, ("scale", "shift"), scale, shift, x, rows, broadcast)
    checks.check_activation(OP, activation)
    wanted = dispatch.wants_gradient(x, weight, scale, shift)
    return dispatch.choose(OPERATION, x, dispatch.NO_GRADIENTS if wanted else "")


OPERATION = OPERATIONS[OP] = Operation(OP, ("native", "triton"), choose)


# --- Launching --------------------------------------------------------------------------------


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    scale: Maybe
    shift: Maybe
    eps: float
    silu: bool
    backend: str


def _launch(call: Arguments, shape: Any, y: Tensor) -> None:
    x, weight, scale, shift, eps, silu, backend = call
    if backend == "native":
        native.launch(OP, backend, x, shape, *map(address, (*call[:4], y)))
        return
    from fastdiff.kernels import rms_norm_silu as kernels

    kernels.forward(x, weight, eps, scale, shift, silu, y)


def _readable(call: Arguments) -> Arguments:
    """With copies of what no kernel reads as it stands (strange strides, mixed and wide dtypes)."""
    x, weight = call.x, call.weight
    if weight.dtype not in KERNEL_DTYPES:
        weight = weight.float()
    x = in_kernels_layout(x, x)
    scale, shift = rows(call.scale, call.shift)
    return call._replace(x=x, weight=weight.contiguous(), scale=scale, shift=shift)


def _plan(call: Arguments) -> Any:
    """What the kernel is told of the shapes; None for arguments that it does not read."""
    if not all(map(operator.is_, call, _readable(call))):
        return None
    if call.backend == "triton":
        return ()  # its launcher derives its own
    shape = norm_shape(call.x, call.scale, call.shift)
    return native.library().RmsNormShape(
        **shape, silu=call.silu, eps=call.eps, weight_dtype=code(call.weight)
    )


_kernel = Kernel(
    OP,
    Arguments,
    lambda call: (torch.empty_like(call.x),),
    _launch,
    outputs=1,
    plan=lambda call: plan_of(_plan, call, call[:4], *call[4:]),
    readable=_readable,
)

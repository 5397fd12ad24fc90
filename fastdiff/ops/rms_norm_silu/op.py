"""RMS norm over the channels + FiLM + SiLU in one call."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import backends, dispatch, native, norms
from fastdiff.ops.differentiable import Kernel
from fastdiff.ops.dispatch import Choice
from fastdiff.ops.layouts import Maybe, address, code, row_stride
from fastdiff.ops.plans import plan_of
from fastdiff.ops.rms_norm_silu import reference as reference

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
    _check(x, weight, scale, shift, activation)
    backend = choose(x, weight, scale=scale, shift=shift).backend
    if backend == "reference":
        return reference.rms_norm_silu(
            x, weight, eps=eps, scale=scale, shift=shift, activation=activation
        )
    y = _kernel(Arguments(x, weight, scale, shift, eps, activation is not None, backend))[0]
    assert y is not None
    return y


def choose(
    x: Tensor, weight: Tensor, *, scale: Maybe = None, shift: Maybe = None, **_: Any
) -> Choice:
    """Which backend serves this call, and why (``fastdiff.explain``)."""
    wanted = dispatch.wants_gradient(x, weight, scale, shift)
    return dispatch.choose(OPERATION, x, dispatch.NOT_DIFFERENTIABLE if wanted else None)


OPERATION = dispatch.register(OP, choose, kernels=("native", "triton"))


def _check(x: Tensor, weight: Tensor, scale: Maybe, shift: Maybe, activation: str | None) -> None:
    norms.check_x(OP, x)
    rows = x.shape[:2]
    if not isinstance(weight, Tensor):
        raise norms.no_tensor(OP, "weight", weight)
    found = norms.describe(weight)
    if not weight.is_floating_point():
        raise InputError(f"{OP}: weight is {found}; expected a floating-point tensor")
    norms.check_device(OP, "weight", weight, x)
    if weight.numel() != rows[1]:
        raise InputError(
            f"{OP}: weight is {found}; expected {rows[1]} elements, one for each channel of x"
        )
    norms.check_film_and_activation(OP, scale, shift, activation)
    if scale is not None:
        broadcast = rows + (1,) * (x.dim() - 2)
        norms.check_like(OP, "scale", scale, x, rows, broadcast)
        norms.check_like(OP, "shift", shift, x, rows, broadcast)


# --- Launching --------------------------------------------------------------------------------


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    scale: Maybe
    shift: Maybe
    eps: float
    silu: bool
    backend: str


def _launch(call: Arguments, y: Tensor) -> bool | None:
    x, weight, scale, shift, eps, silu, backend = call
    shape = plan_of(_plan, (x, weight, scale, shift), eps, silu, backend)
    if shape is None:
        return False
    if backend == "native":
        native.library().rms_norm_silu_cpu(
            shape, x.data_ptr(), weight.data_ptr(), address(scale), address(shift),
            y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    else:
        from fastdiff.kernels import rms_norm_silu as kernels

        with backends.device_of(x):
            kernels.forward(x, weight, eps, scale, shift, silu, y)
    return None


def _readable(call: Arguments) -> Arguments:
    """With copies of what no kernel reads as it stands (strange strides, mixed and wide dtypes)."""
    x, weight = call.x, call.weight
    if weight.dtype not in backends.KERNEL_DTYPES:
        weight = weight.float()
    scale, shift = norms.rows(call.scale, call.shift)
    x = norms.in_layout_of(norms.dense_like(x), x)
    return call._replace(x=x, weight=weight.contiguous(), scale=scale, shift=shift)


def _plan(x: Tensor, weight: Tensor, scale: Maybe, shift: Maybe, *options: Any) -> Any:
    """What the kernel is told of the shapes; None for arguments that it does not read."""
    eps, silu, backend = options
    call = Arguments(x, weight, scale, shift, *options)
    if not norms.unchanged(call, _readable(call)):
        return None
    if backend == "triton":
        return ()  # its launcher derives its own
    n, channels = x.shape[:2]
    positions = x.numel() // (n * channels)
    return native.library().RmsNormShape(
        samples=n,
        channels=channels,
        positions=positions,
        # One position: channels are neighbours, which only the channels_last kernel vectorises.
        channels_last=positions == 1 or not x.is_contiguous(),
        silu=silu,
        eps=eps,
        dtype=code(x),
        weight_dtype=code(weight),
        film_dtype=code(scale),
        scale_stride=row_stride(scale),
        shift_stride=row_stride(shift),
    )


_kernel = Kernel(
    OP,
    Arguments,
    lambda call: (torch.empty_like(call.x),),
    _launch,
    outputs=1,
    readable=_readable,
)

"""GroupNorm + FiLM + SiLU in one call, forward and backward."""

from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import dispatch, norms
from fastdiff.ops.backends import short
from fastdiff.ops.differentiable import Kernel, differentiable_once
from fastdiff.ops.dispatch import Choice
from fastdiff.ops.group_norm_silu import launch as launch
from fastdiff.ops.group_norm_silu import reference as reference
from fastdiff.ops.group_norm_silu.launch import Arguments, Backward
from fastdiff.ops.layouts import Maybe

OP = "group_norm_silu"
# Contiguous float32 tensors up to this size train on PyTorch's operations: a call of autograd's
# Python side costs more than the kernels save (benchmarks/results, the smallest shapes of
# forward+backward). Not channels_last ones and not those in half precision, which the reference
# copies to float32 and back.
SMALL = 32768


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """``silu(group_norm(x + add)·(1 + scale) + shift)``, with statistics in float32.

    Args:
        x: (N, C, *spatial), any number of spatial dimensions and any layout; the result has both.
        num_groups: divides C; each group of C / num_groups channels of one sample is normalised.
        weight: (C,), or None for a norm without parameters.
        bias: likewise.
        eps: added to the variance.
        scale: (N, C), or None, like shift, for no FiLM.
        shift: (N, C), given exactly when scale is.
        add: added to x before the norm: (N, C), an embedding, or a residual of x's own shape.
        activation: ``"silu"``, or None for the norm (and FiLM) alone.

    Returns:
        (N, C, *spatial) in the dtype of ``x``, also under autocast. Differentiable once in every
        tensor; for more, use ``fastdiff.backend("reference")``.

    Raises:
        InputError: shapes, dtypes, devices or names that do not fit.

    Source: Wu & He 2018, equation 1; FiLM as in Nichol & Dhariwal 2021, section 3.
    """
    _check(x, num_groups, weight, bias, scale, shift, add, activation)
    training = dispatch.wants_gradient(x, weight, bias, scale, shift, add)
    backend = _choose(x, training).backend
    if backend == "reference":
        return reference.group_norm_silu(
            x, num_groups, weight, bias, eps, scale=scale, shift=shift, add=add,
            activation=activation,
        )  # fmt: skip
    silu = activation is not None
    call = Arguments(
        x, weight, bias, scale, shift, add, num_groups, eps, silu, backend, keep=training
    )
    y = _kernel(call, training)[0]
    assert y is not None
    return y


def choose(x: Tensor, *others: Any, **options: Any) -> Choice:
    """Which backend serves this call, and why (``fastdiff.explain``)."""
    tensors = (v for v in (*others, *options.values()) if isinstance(v, Tensor))
    return _choose(x, dispatch.wants_gradient(x, *tensors))


OPERATION = dispatch.register(OP, choose, kernels=("native", "triton", "cuda"))


def _choose(x: Tensor, training: bool) -> Choice:
    small = training and x.is_cpu and x.dtype == torch.float32 and 0 < x.numel() <= SMALL
    if small and x.is_contiguous():
        return dispatch.choose(OPERATION, x, rule=_pytorch_trains)
    return dispatch.choose(OPERATION, x)


def _pytorch_trains() -> tuple[str, str]:
    return "reference", f"PyTorch's operations train up to {SMALL} float32 elements faster"


def _check(
    x: Tensor,
    num_groups: int,
    weight: Maybe,
    bias: Maybe,
    scale: Maybe,
    shift: Maybe,
    add: Maybe,
    activation: str | None,
) -> None:
    norms.check_x(OP, x)
    rows = x.shape[:2]
    channels = rows[1]
    if not isinstance(num_groups, int):
        raise InputError(f"{OP}: num_groups={num_groups!r}; expected an int")
    if num_groups < 1 or channels % num_groups:
        raise InputError(
            f"{OP}: num_groups={num_groups} does not divide the {channels} channels of x"
        )
    if (weight is None) != (bias is None):
        raise InputError(f"{OP}: give both weight and bias, or neither")
    norms.check_film_and_activation(OP, scale, shift, activation)
    if weight is not None:
        norms.check_like(OP, "weight", weight, x, rows[1:])
        norms.check_like(OP, "bias", bias, x, rows[1:])
    if scale is not None:
        norms.check_like(OP, "scale", scale, x, rows)
        norms.check_like(OP, "shift", shift, x, rows)
    if add is not None:
        if not isinstance(add, Tensor):
            raise norms.no_tensor(OP, "add", add)
        if add.shape != x.shape:
            norms.check_like(OP, "add", add, x, rows, x.shape, "x's own ")
        elif add.dtype != x.dtype or add.device != x.device:
            raise InputError(
                f"{OP}: add is {norms.describe(add)} on {add.device}; a residual must have x's "
                f"dtype and device, {short(x.dtype)} on {x.device}"
            )


_kernel = Kernel(
    OP, Arguments, launch.allocate, launch.forward, outputs=2, readable=launch.readable
)
_backward = Kernel(
    f"{OP}_backward",
    Backward,
    launch.allocate_gradients,
    launch.backward,
    outputs=6,
    readable=lambda given: given._replace(call=launch.readable(given.call)),
)
differentiable_once(_kernel, _backward, keeps=(1,))

"""GroupNorm + FiLM + SiLU in one call, forward and backward."""

from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import dispatch
from fastdiff.ops.checks import check_activation, check_pair, check_tensor, check_x, refusal
from fastdiff.ops.dispatch import Choice
from fastdiff.ops.group_norm_silu import reference as reference
from fastdiff.ops.group_norm_silu.launch import Arguments, kernel
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
        film: dict[str, Any] = {"scale": scale, "shift": shift, "add": add}
        return reference.group_norm_silu(
            x, num_groups, weight, bias, eps, **film, activation=activation
        )
    silu = activation is not None
    call = Arguments(x, weight, bias, scale, shift, add, num_groups, eps, silu, backend, training)
    return kernel(call, training)[0]


def choose(x: Tensor, *others: Any, **options: Any) -> Choice:
    """Which backend serves this call, and why (``fastdiff.explain``)."""
    return _choose(x, dispatch.wants_gradient(x, *others, *options.values()))


OPERATION = dispatch.register(OP, choose, kernels=("native", "triton", "cuda"))


def _choose(x: Tensor, training: bool) -> Choice:
    small = training and x.is_cpu and x.dtype == torch.float32 and 0 < x.numel() <= SMALL
    rule = _pytorch_trains if small and x.is_contiguous() else None
    return dispatch.choose(OPERATION, x, rule=rule)


def _pytorch_trains() -> tuple[str, str]:
    return "reference", f"PyTorch's operations train up to {SMALL} float32 elements faster"


def _check(
    x: Tensor, num_groups: int, weight: Maybe, bias: Maybe, scale: Maybe, shift: Maybe, add: Maybe,
    activation: str | None,
) -> None:  # fmt: skip
    check_x(OP, x)
    rows = x.shape[:2]
    if not isinstance(num_groups, int) or num_groups < 1 or rows[1] % num_groups:
        raise InputError(
            f"{OP}: num_groups={num_groups!r}; expected an int that divides x's {rows[1]} channels"
        )
    check_pair(OP, ("weight", "bias"), weight, bias, x, rows[1:])
    check_pair(OP, ("scale", "shift"), scale, shift, x, rows)
    check_activation(OP, activation)
    if add is not None:
        check_tensor(OP, "add", add, x, rows, x.shape)
        if add.shape == x.shape and add.dtype != x.dtype:
            raise refusal(OP, "add", add, f"{x.dtype}, as a residual has the dtype of x")

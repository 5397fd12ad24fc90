"""GroupNorm + FiLM + SiLU in one call."""

from typing import Any

from torch import Tensor

from fastdiff.backends import Choice
from fastdiff.errors import InputError
from fastdiff.reference import group_norm_silu as reference

ACTIVATIONS = ("silu", None)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """``silu(group_norm(x)·(1 + scale) + shift)``, with statistics in float32.

    Args:
        x: (N, C, *spatial), any number of spatial dimensions and any layout; the result has both.
        num_groups: divides C; each group of C / num_groups channels of one sample is normalised.
        weight, bias: (C,), or None for a norm without parameters.
        eps: added to the variance.
        scale, shift: (N, C), or both None for no FiLM.
        activation: ``"silu"``, or None for the norm (and FiLM) alone.

    Returns:
        (N, C, *spatial) in the dtype of ``x``, also under autocast.

    Raises:
        InputError: shapes, dtypes or names that do not fit.

    Source: Wu & He 2018, equation 1; FiLM as in Nichol & Dhariwal 2021, section 3.
    """
    _check(x, num_groups, weight, bias, scale, shift, activation)
    return reference.group_norm_silu(
        x, num_groups, weight, bias, eps, scale=scale, shift=shift, activation=activation
    )


def _check(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> None:
    if x.dim() < 2 or not x.is_floating_point():
        raise InputError(
            f"group_norm_silu: x is {_describe(x)}; expected floating-point (N, C, *spatial)"
        )
    n, channels = x.shape[:2]
    if num_groups < 1 or channels % num_groups:
        raise InputError(
            f"group_norm_silu: num_groups={num_groups} does not divide the {channels} channels of x"
        )
    if (weight is None) != (bias is None):
        raise InputError("group_norm_silu: give both weight and bias, or neither")
    if (scale is None) != (shift is None):
        raise InputError("group_norm_silu: give both scale and shift, or neither")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != (channels,):
            raise InputError(
                f"group_norm_silu: {name} is {_describe(tensor)}; expected shape ({channels},)"
            )
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is not None and tensor.shape != (n, channels):
            raise InputError(
                f"group_norm_silu: {name} is {_describe(tensor)}; expected shape ({n}, {channels})"
            )
    if activation not in ACTIVATIONS:
        raise InputError(f"group_norm_silu: activation={activation!r}; expected 'silu' or None")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def choose(x: Tensor, *_: Any, **__: Any) -> Choice:
    """What the plan picks for this call (``fastdiff.explain``)."""
    return Choice("group_norm_silu", "reference", "the kernels are yet to come")

"""GroupNorm + FiLM + SiLU in one call, forward and backward."""

from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import backends
from fastdiff.ops.backends import Choice, short
from fastdiff.ops.group_norm_silu import launch as launch
from fastdiff.ops.group_norm_silu import reference as reference

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
    tensors = (weight, bias, scale, shift, add)
    _check(x, num_groups, *tensors, activation)
    wants_gradient = torch.is_grad_enabled() and _any_requires_grad(x, *tensors)
    backend = _backend(x, wants_gradient)
    directly = backend != "reference" and backends.launches_directly(x, *tensors)
    if not directly and backend != "reference" and backends.transforms():
        backend = backends.under_transforms(OP)
    if backend == "reference":
        return reference.group_norm_silu(
            x, num_groups, weight, bias, eps, scale=scale, shift=shift, add=add,
            activation=activation,
        )  # fmt: skip
    silu = activation is not None
    arguments = (x, num_groups, weight, bias, eps, scale, shift, add, silu)
    if not directly:
        return _forward(*arguments)[0] if wants_gradient else _inference(*arguments)
    return _Function.apply(*arguments) if wants_gradient else launch.inference(*arguments)


def choose(x: Tensor, *arguments: Any, **options: Any) -> Choice:
    """Which backend serves this call, and why (``fastdiff.explain``)."""
    tensors = (x, *arguments, *options.values())
    wants_gradient = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in tensors
    )
    backend = _backend(x, wants_gradient)
    if backend != "reference" and backends.transforms():
        return Choice(OP, backends.under_transforms(OP), backends.TRANSFORMS_REASON)
    if backends.named() is not None:
        return Choice(OP, backend, backends.NAMED_REASON)
    if backend == "reference" and x.device.type == "cpu" and x.dtype in backends.KERNEL_DTYPES:
        return Choice(
            OP, backend, f"PyTorch's operations train up to {SMALL} float32 elements faster"
        )
    return Choice(OP, backend, backends.default_reason(x.device, x.dtype, OP))


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    for tensor in tensors:  # half the time of any(), which a small norm notices
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _backend(x: Tensor, wants_gradient: bool) -> str:
    name = backends.named()
    if name is not None:
        return backends.require(OP, name, x.device, x.dtype)
    name = backends.default(x.device, x.dtype, OP)
    small = 0 < x.numel() <= SMALL and x.dtype == torch.float32 and x.is_contiguous()
    if name == "native" and wants_gradient and small:
        return "reference"
    return name


# --- torch.library ----------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, "
    "Tensor? scale, Tensor? shift, Tensor? add, bool silu"
)
_LIBRARY = torch.library.Library("fastdiff", "FRAGMENT")
# (y, statistics), the groups' mean and rstd as float32 (2, N, num_groups); differentiable.
_LIBRARY.define(f"group_norm_silu({_ARGUMENTS}) -> (Tensor, Tensor)")
# y alone; without a formula for autograd a call costs half as much.
_LIBRARY.define(f"group_norm_silu_inference({_ARGUMENTS}) -> Tensor")
# The gradients of x, weight, bias, scale, shift and add; empty ones for what has none.
_LIBRARY.define(
    f"group_norm_silu_backward(Tensor dy, Tensor statistics, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("group_norm_silu", launch.forward, _device)
    _LIBRARY.impl("group_norm_silu_inference", launch.inference, _device)
    _LIBRARY.impl("group_norm_silu_backward", launch.operator_backward, _device)
_forward = torch.ops.fastdiff.group_norm_silu.default
_inference = torch.ops.fastdiff.group_norm_silu_inference.default
_backward = torch.ops.fastdiff.group_norm_silu_backward.default
torch.library.register_fake(
    "fastdiff::group_norm_silu_backward", launch.fake_backward, lib=_LIBRARY
)


@torch.library.register_fake("fastdiff::group_norm_silu", lib=_LIBRARY)
def _(x: Tensor, num_groups: int, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((2, x.shape[0], num_groups), dtype=torch.float32)


@torch.library.register_fake("fastdiff::group_norm_silu_inference", lib=_LIBRARY)
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, num_groups, weight, bias, eps, scale, shift, add, silu = inputs
    ctx.rest = (num_groups, eps, silu)
    ctx.save_for_backward(output[1], x, weight, bias, scale, shift, add)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """One gradient, or None, for every argument of the operator."""
    if dy is None:
        return (None,) * 9
    statistics, x, weight, bias, scale, shift, add = ctx.saved_tensors
    num_groups, eps, silu = ctx.rest
    arguments = (dy, statistics, x, num_groups, weight, bias, eps, scale, shift, add, silu)
    if not backends.launches_backward_directly(dy):
        out = _backward(*arguments)
        given = (x, weight, bias, scale, shift, add)
        out = [d if like is not None else None for d, like in zip(out, given, strict=True)]
    elif torch.is_grad_enabled():
        out = _Once.apply(*arguments)
    else:
        out = launch.backward(*arguments)
    dx, dweight, dbias, dscale, dshift, dadd = out
    if add is not None and add.shape == x.shape:
        dadd = dx
    return dx, None, dweight, dbias, None, dscale, dshift, dadd, None


torch.library.register_autograd(
    "fastdiff::group_norm_silu", _gradients, setup_context=_setup_context, lib=_LIBRARY
)


class _Function(torch.autograd.Function):
    """The same formulas in eager mode, for a fifth of what register_autograd costs per call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = launch.forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output[0]

    backward = staticmethod(_gradients)


def _refuse(ctx: Any, *_: Any) -> Any:
    raise InputError(
        f"{OP} is differentiable once; for higher derivatives run it under "
        "fastdiff.backend('reference')"
    )


torch.library.register_autograd("fastdiff::group_norm_silu_backward", _refuse, lib=_LIBRARY)


class _Once(torch.autograd.Function):
    """The backward where somebody keeps its graph: a second derivative is refused."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        return launch.backward(*arguments)

    backward = staticmethod(_refuse)


# --- Checks -----------------------------------------------------------------------------------


def _check(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    activation: str | None,
) -> None:
    if not isinstance(x, Tensor):
        raise _no_tensor("x", x)
    shape = x.shape
    if len(shape) < 2 or not x.is_floating_point():
        raise InputError(f"{OP}: x is {_describe(x)}; expected floating-point (N, C, *spatial)")
    n, channels = shape[0], shape[1]
    if not isinstance(num_groups, int):
        raise InputError(f"{OP}: num_groups={num_groups!r}; expected an int")
    if num_groups < 1 or channels % num_groups:
        raise InputError(
            f"{OP}: num_groups={num_groups} does not divide the {channels} channels of x"
        )
    if (weight is None) != (bias is None):
        raise InputError(f"{OP}: give both weight and bias, or neither")
    if (scale is None) != (shift is None):
        raise InputError(f"{OP}: give both scale and shift, or neither")
    if weight is not None:
        _check_like("weight", weight, (channels,), x)
        _check_like("bias", bias, (channels,), x)
    if scale is not None:
        _check_like("scale", scale, (n, channels), x)
        _check_like("shift", shift, (n, channels), x)
    if add is not None:
        if not isinstance(add, Tensor):
            raise _no_tensor("add", add)
        if add.shape != shape:
            _check_like("add", add, (n, channels), x, f" or x's own {tuple(shape)}")
        elif add.dtype != x.dtype or add.device != x.device:
            raise InputError(
                f"{OP}: add is {_describe(add)} on {add.device}; a residual must have x's dtype "
                f"and device, {short(x.dtype)} on {x.device}"
            )
    if activation is not None and activation != "silu":
        raise InputError(f"{OP}: activation={activation!r}; expected 'silu' or None")


def _check_like(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor, also: str = ""
) -> None:
    if not isinstance(tensor, Tensor):
        raise _no_tensor(name, tensor)
    if tensor.shape != shape or not tensor.is_floating_point():
        raise InputError(
            f"{OP}: {name} is {_describe(tensor)}; expected floating-point {tuple(shape)}{also}"
        )
    if tensor.device != x.device:
        raise InputError(
            f"{OP}: {name} is on {tensor.device} but x is on {x.device}: move one of them"
        )


def _no_tensor(name: str, value: object) -> InputError:
    return InputError(f"{OP}: {name} is a {type(value).__name__}; expected a tensor")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {short(tensor.dtype)}"

"""A convolution with the norm before it and the additions after it in one call."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import dispatch
from fastdiff.ops.backends import KERNEL_DTYPES
from fastdiff.ops.checks import check_activation, check_tensor, check_x, refusal
from fastdiff.ops.convolution import reference, training
from fastdiff.ops.convolution.launch import (
    empty_channels_last,
    out_size,
    prepared,
    shape_of,
    to_channels_last,
)
from fastdiff.ops.convolution.packed import Packed, pack
from fastdiff.ops.differentiable import Kernel, Launch
from fastdiff.ops.dispatch import OPERATIONS, Choice, Operation, wants_gradient
from fastdiff.ops.layouts import Maybe

OP = "convolution"
MOST_TAPS = 49  # kMostTaps of csrc/cpu/convolution_geometry.h
# Why no kernel can serve a call.
FUSED_GRADIENTS = (
    "a tensor requires a gradient, and only 'reference' has those of what is fused with a "
    "convolution (use torch.no_grad())"
)
LINE = 16  # channels that the kernel takes at a time: of x, where another source follows


def convolution(
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor | None = None,
    *,
    second: Tensor | None = None,
    coefficients: Tensor | None = None,
    activation: str | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    upsample: bool = False,
    moments: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``conv(activation(coefficients₀·[x, second] + coefficients₁)) + bias + add + residual``.

    Args:
        x: (N, C, *spatial), 1 to 3 spatial dimensions.
        weight: (K, C + C2, *kernel), or what ``pack`` has made of it.
        bias: (K,).
        second: (N, C2, *spatial), channels after x's.
        coefficients: (N, 2, C + C2), a scale and a shift: ``norm_coefficients`` makes them.
        activation: ``"silu"`` or None.
        add: (N, K), added at every position: a projected embedding.
        residual: of the result's shape.
        stride: in every dimension.
        padding: zeros before the first and after the last position, in every dimension; they are
            added after the activation.
        upsample: double the input in every dimension, each position repeated.
        moments: answer the result's moments too.

    Returns:
        (N, K, *spatial') in the dtype of ``x``, in 2-D channels_last; and (N, 2, K) float32 with
        the mean and the biased variance of each sample's channels, or None. Sums are float32.
        Products are float32, or bfloat16 where ``x`` is; of weights that are packed on a CPU with
        AMX, float32 values are taken as the sum of two bfloat16, which is exact to 2⁻¹⁷.

    A convolution of x alone with a bias has gradients of its own, once, with the same products;
    otherwise they are the reference's. Raises InputError for shapes, dtypes, devices or names that
    do not fit.

    Source: Ho et al. 2020, appendix B, and Wu & He 2018, equation 1.
    """
    check_x(OP, x)
    check_activation(OP, activation)
    packed = weight if isinstance(weight, Packed) else None
    whole = weight.weight if isinstance(weight, Packed) else weight
    tensors = (bias, second, coefficients, add, residual)
    _check(x, whole, *tensors, stride, padding, upsample)
    named: dict[str, Any] = {"second": second, "coefficients": coefficients, "add": add}
    named |= {"residual": residual, "upsample": upsample, "activation": activation}
    named |= {"moments": moments}
    backend = choose(x, whole, bias, **named).backend
    if backend == "reference":
        named |= {"stride": stride, "padding": padding}
        rounded = whole.to(x.dtype) if x.dtype in KERNEL_DTYPES else whole
        return reference.convolution(x, rounded, bias, **named)
    if wants_gradient(x, whole, bias):
        plain = training.Arguments(x, whole, bias, stride, *padding)
        return training.forward(plain, True)[0], None
    if packed is None or packed.panels is None:
        packed = pack(whole, x.dtype)
    elif packed.folded is not None and (packed.folded, True, 1) != (padding[0], upsample, stride):
        raise InputError(
            f"{OP}: upsample={upsample}, padding={padding}, stride={stride}; expected what the "
            f"weight was packed for: upsample=True, padding=({packed.folded}, …), stride=1"
        )
    assert packed.panels is not None
    return _kernel(
        Arguments(
            x,
            packed.panels,
            *tensors,
            out_channels=whole.shape[0],
            kernel_height=whole.shape[2],
            kernel_width=whole.shape[3],
            stride=stride,
            before=padding[0],
            after=padding[1],
            upsample=upsample,
            folded=packed.folded is not None,
            silu=activation is not None,
            products=int(packed.products),
            moments=moments,
        )
    )


def choose(
    x: Tensor, weight: Any, bias: Maybe = None, *, stride: int = 1,
    padding: tuple[int, int] = (0, 0), **fused: Any,
) -> Choice:  # fmt: skip
    """What serves this call and why (``fastdiff.explain``)."""
    whole = weight.weight if isinstance(weight, Packed) else weight
    missing = ""
    if any(v is not None and v is not False for v in fused.values()):
        if wants_gradient(x, whole, bias, *fused.values()):
            missing = FUSED_GRADIENTS
    if x.dim() != 4:
        missing = "only 'reference' takes other than two spatial dimensions"
    elif whole.shape[2:].numel() > MOST_TAPS:
        missing = f"only 'reference' takes kernels of more than {MOST_TAPS} taps"
    return dispatch.choose(OPERATION, x, missing)


OPERATION = OPERATIONS[OP] = Operation(OP, ("native",), choose)


class Arguments(NamedTuple):
    x: Tensor
    panels: Tensor
    bias: Maybe
    second: Maybe
    coefficients: Maybe
    add: Maybe
    residual: Maybe
    out_channels: int
    kernel_height: int
    kernel_width: int
    stride: int
    before: int
    after: int
    upsample: bool
    folded: bool
    silu: bool
    products: int
    moments: bool


def _check(
    x: Tensor, weight: Any, bias: Maybe, second: Maybe, coefficients: Maybe, add: Maybe,
    residual: Maybe, stride: int, padding: tuple[int, int], upsample: bool,
) -> None:  # fmt: skip
    """InputError for arguments that do not fit each other."""
    n, channels, *size = x.shape
    if second is not None:
        check_tensor(
            OP, "second", second, x, (n, second.shape[1] if second.dim() > 1 else 0, *size)
        )
        channels += second.shape[1]
    if not isinstance(weight, Tensor) or weight.dim() != x.dim() or weight.shape[1] != channels:
        kernel = ", ".join(["kernel"] * len(size))
        raise refusal(OP, "weight", weight, f"(K, {channels}, {kernel})")
    k = weight.shape[0]
    if stride < 1 or min(padding) < 0:
        raise InputError(
            f"{OP}: stride={stride}, padding={padding}; expected a stride of at least 1 and two "
            "numbers of at least 0"
        )
    out = out_size(size, weight.shape[2:], stride, sum(padding), upsample)
    if min(out, default=1) < 1:
        raise InputError(
            f"{OP}: x has shape {tuple(x.shape)}, which is smaller than the kernel "
            f"{tuple(weight.shape[2:])} with padding {padding}"
        )
    for name, tensor, shape in (
        ("bias", bias, (k,)),
        ("coefficients", coefficients, (n, 2, channels)),
        ("add", add, (n, k)),
        ("residual", residual, (n, k, *out)),
    ):
        if tensor is not None:
            check_tensor(OP, name, tensor, x, shape)


def _readable(call: Arguments) -> Arguments:
    """With copies of what the kernel does not read as it stands."""
    x, second = call.x, call.second
    if second is not None and x.shape[1] % LINE:  # both in a register
        x, second = torch.cat([x, second.to(x.dtype)], dim=1), None
    x, second, residual = (to_channels_last(v, x.dtype) for v in (x, second, call.residual))
    bias, coefficients = (None if v is None else v.float().contiguous() for v in call[2:5:2])
    add = call.add
    if add is not None and (add.dtype != torch.float32 or add.stride(1) != 1):
        add = add.float().contiguous()
    made = {"x": x, "second": second, "residual": residual, "bias": bias, "add": add}
    return call._replace(**made, coefficients=coefficients)


def _allocate(call: Arguments) -> tuple[Tensor, Maybe]:
    n, k = call.x.shape[0], call.out_channels
    kernel, zeros = (call.kernel_height, call.kernel_width), call.before + call.after
    size = out_size(call.x.shape[2:], kernel, call.stride, zeros, call.upsample)
    y = empty_channels_last(call.x, (n, k, *size))
    return y, call.x.new_empty((n, 2, k), dtype=torch.float32) if call.moments else None


def _plan(call: Arguments) -> Any:
    """What fills y and moments for calls like this one."""
    shape = shape_of(
        call.x,
        call.out_channels,
        (call.kernel_height, call.kernel_width),
        call.stride,
        (call.before, call.after),
        call.products,
        second=call.second,
        add=call.add,
        upsample=call.upsample,
        folded=call.folded,
        silu=call.silu,
    )
    return Launch(partial(prepared, shape))


_kernel = Kernel(OP, Arguments, _allocate, _plan, readable=_readable, outputs=2)
bound = _kernel.bound

"""A convolution of x alone as a training's forward makes it, and its gradients, on the CPU.

The gradient of x is a convolution of y's with the weight transposed, by the same kernel; that of
the weight is the sum over places of csrc/cpu/convolution_weight_gradient.cpp. A weight changes from
step to step, so it is packed at each call.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.ops import backends, native
from fastdiff.ops.convolution.fastest import Products, fastest_once, products_of
from fastdiff.ops.convolution.launch import (
    empty_channels_last,
    out_size,
    prepared,
    shape_of,
    to_channels_last,
)
from fastdiff.ops.convolution.packed import lent_panels, with_taps_in_order
from fastdiff.ops.differentiable import Kernel, refuse_second_derivatives
from fastdiff.ops.layouts import Maybe
from fastdiff.ops.native import address


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Maybe
    stride: int
    before: int
    after: int


class Backward(NamedTuple):
    grad: Tensor
    x: Tensor
    weight: Tensor
    stride: int
    before: int
    after: int
    wants_x: bool
    wants_weight: bool
    wants_bias: bool


def _readable(call: Any) -> Any:
    """Either record with copies of what the kernels do not read as it stands."""
    x = to_channels_last(call.x, call.x.dtype)
    call = call._replace(x=x, weight=with_taps_in_order(call.weight.float()))
    if isinstance(call, Backward):
        return call._replace(grad=to_channels_last(call.grad, x.dtype))
    return call if call.bias is None else call._replace(bias=call.bias.float().contiguous())


def _allocate(call: Arguments) -> tuple[Tensor]:
    zeros = call.before + call.after
    size = out_size(call.x.shape[2:], call.weight.shape[2:], call.stride, zeros)
    return (empty_channels_last(call.x, (call.x.shape[0], call.weight.shape[0], *size)),)


def _plan(call: Arguments) -> Callable[..., None]:
    """What fills y for calls like this one."""
    n, _, *size = _allocate(call)[0].shape
    positions = n * size[0] * size[1]
    products = fastest_once(call.x.dtype, call.weight.shape, positions, call.stride)
    shape = _shape(call.x, call.weight.shape, *call[3:], products)

    def fill(x: Tensor, weight: Tensor, bias: Maybe, y: Tensor) -> None:
        with lent_panels(weight, products) as panels:
            prepared(shape, x, panels, bias, None, None, None, None, y, None)()

    return fill


def _shape(
    x: Tensor, kernel: Sequence[int], stride: int, before: int, after: int, products: Products
) -> Any:
    """As the library has it, with a weight of shape ``kernel``."""
    return shape_of(x, kernel[0], kernel[2:], stride, (before, after), int(products))


def _allocate_gradients(call: Backward) -> tuple[Maybe, Maybe, Maybe]:
    x, weight = call.x, call.weight
    return (
        empty_channels_last(x, x.shape) if call.wants_x else None,
        torch.empty_like(weight, dtype=torch.float32) if call.wants_weight else None,
        weight.new_empty(len(weight), dtype=torch.float32) if call.wants_bias else None,
    )


def _plan_gradients(call: Backward) -> Callable[..., None]:
    """What fills the gradients of x, weight and bias that are wanted, for calls like this one."""
    of_x, of_weight = _plan_data(call), _plan_weight(call)

    def fill(grad: Tensor, x: Tensor, weight: Tensor, dx: Maybe, dw: Maybe, db: Maybe) -> None:
        if dx is not None:
            of_x(grad, weight, dx)
        if dw is not None:
            of_weight(x, grad, dw, db)
        elif db is not None:
            db.copy_(grad.sum((0, 2, 3), dtype=torch.float32))

    return fill


def _plan_data(call: Backward) -> Callable[[Tensor, Tensor, Tensor], None]:
    grad, x, weight, stride, before, after, *_ = call
    k, channels, height, width = weight.shape
    if stride > 1 or height != width or max(before, after) >= height:
        return lambda grad, weight, dx: _data_by_pytorch(grad, weight, dx, stride, before, after)
    products = fastest_once(x.dtype, weight.shape, len(x) * x.shape[2] * x.shape[3], 1)
    rests = height - 1 - before, height - 1 - after
    shape = _shape(grad, (channels, k, height, width), 1, *rests, products)

    def fill(grad: Tensor, weight: Tensor, dx: Tensor) -> None:
        with lent_panels(weight, products, transposed=True) as panels:
            prepared(shape, grad, panels, None, None, None, None, None, dx, None)()

    return fill


def _data_by_pytorch(
    grad: Tensor, weight: Tensor, dx: Tensor, stride: int, before: int, after: int
) -> None:
    """With strides: each of their remainders is a convolution of its own there."""
    height, width = dx.shape[2:]
    padded = dx.new_empty(1).expand(*dx.shape[:2], height + before + after, width + before + after)
    found, *_ = torch.ops.aten.convolution_backward(
        grad, padded, weight.to(grad.dtype), None, [stride] * 2, [0, 0], [1, 1], False, [0, 0], 1,
        [True, False, False],
    )  # fmt: skip
    dx.copy_(found[:, :, before : before + height, before : before + width])


def _plan_weight(call: Backward) -> Callable[[Tensor, Tensor, Tensor, Maybe], None]:
    products = products_of(call.x.dtype)
    shape = _shape(call.x, call.weight.shape, call.stride, call.before, call.after, products)

    def fill(x: Tensor, grad: Tensor, dw: Tensor, db: Maybe) -> None:
        library = native.library()
        places = map(address, (x, grad, dw, db))
        strides = dw.stride(0), dw.stride(1), dw.stride(3)
        native.in_threads(
            partial(library.convolution_weight_gradient_cpu, shape, *places, *strides),
            partial(library.convolution_weight_gradient_workspace, shape),
        )()

    return fill


forward = Kernel("convolution_training", Arguments, _allocate, _plan, readable=_readable)
backward = Kernel(
    "convolution_training_backward", Backward, _allocate_gradients, _plan_gradients,
    readable=_readable, outputs=3,
)  # fmt: skip


def _keep(ctx: Any, call: Arguments, outputs: tuple[Tensor]) -> None:
    ctx.save_for_backward(call.x, call.weight)
    ctx.rest = call[3:]
    ctx.bias_dtype = None if call.bias is None else call.bias.dtype


def _gradients(ctx: Any, grad: Tensor) -> tuple[Maybe, ...]:
    x, weight = ctx.saved_tensors
    wants = ctx.needs_input_grad[:3]
    call = Backward(grad, x, weight, *ctx.rest, *wants)
    if backends.launches_backward_directly(grad) and not torch.is_grad_enabled():
        found = backward.run(call)
    else:  # the operator refuses the derivative that whoever keeps the backward's graph may ask
        found = backward.dispatch(call)
    dtypes = (x.dtype, weight.dtype, ctx.bias_dtype)
    return tuple(
        g.to(dtype) if wanted else None
        for g, wanted, dtype in zip(found, wants, dtypes, strict=True)
    )


forward.differentiate(_keep, _gradients)
refuse_second_derivatives(forward, backward)

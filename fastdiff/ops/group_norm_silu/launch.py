"""Launching group_norm_silu's kernels: tensors to memory layouts, row strides and addresses."""

from typing import Any

import torch
from torch import Tensor

from fastdiff.ops import backends, native
from fastdiff.ops.group_norm_silu import cuda as _group_norm_cuda
from fastdiff.ops.layouts import Maybe, address, in_layout_of, is_channels_last, rows
from fastdiff.ops.plans import remember


def forward(
    x: Tensor, num_groups: int, weight: Maybe, bias: Maybe, eps: float,
    scale: Maybe, shift: Maybe, add: Maybe, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, statistics): y like ``torch.empty_like(x)``; the groups' mean and rstd, (2, N, G)."""
    y = torch.empty_like(x)
    statistics = torch.empty((2, x.shape[0], num_groups), dtype=torch.float32, device=x.device)
    _run(y, statistics, x, num_groups, weight, bias, eps, scale, shift, add, silu)
    return y, statistics


def inference(
    x: Tensor, num_groups: int, weight: Maybe, bias: Maybe, eps: float,
    scale: Maybe, shift: Maybe, add: Maybe, silu: bool,
) -> Tensor:  # fmt: skip
    """y alone."""
    y = torch.empty_like(x)
    _run(y, None, x, num_groups, weight, bias, eps, scale, shift, add, silu)
    return y


def _run(
    y: Tensor, statistics: Maybe, x: Tensor, num_groups: int, weight: Maybe, bias: Maybe,
    eps: float, scale: Maybe, shift: Maybe, add: Maybe, silu: bool,
) -> None:  # fmt: skip
    if x.numel() == 0:
        return
    out = y
    backend = _backend(x)
    shape = _shapes.get(_key(backend, x, num_groups, weight, bias, eps, scale, shift, add, silu))
    if shape is None:
        shape, out, x, weight, bias, scale, shift, add = _prepare(
            backend, y, x, num_groups, weight, bias, eps, scale, shift, add, silu
        )
    if backend == "native":
        native.library().group_norm_silu_cpu(
            shape, x.data_ptr(), address(weight), address(bias), address(scale),
            address(shift), address(add), out.data_ptr(), address(statistics),
            torch.get_num_threads(),
        )  # fmt: skip
    elif backend == "cuda":
        _group_norm_cuda.forward(shape, x, weight, bias, scale, shift, add, out, statistics)
    else:
        from fastdiff.kernels import group_norm_silu as kernels

        if statistics is None:
            statistics = torch.empty((2, x.shape[0], num_groups), device=x.device)
        with backends.device_of(x):
            kernels.forward(
                x, num_groups, weight, bias, eps, scale, shift, add, silu, out, *statistics.unbind()
            )
    if out is not y:
        y.copy_(out)


def backward(
    dy: Tensor, statistics: Tensor, x: Tensor, num_groups: int, weight: Maybe, bias: Maybe,
    eps: float, scale: Maybe, shift: Maybe, add: Maybe, silu: bool,
) -> tuple[Maybe, ...]:  # fmt: skip
    """The gradients of (x, weight, bias, scale, shift, add), each like its argument or None.

    A residual's is that of x.
    """
    dx = torch.empty_like(x)
    dweight, dbias = _room(weight), _room(bias)
    dscale, dshift = _room(scale), _room(shift)
    dadd = None if add is None or add.shape == x.shape else _room(add)
    small = (dweight, dbias, dscale, dshift, dadd)
    if x.numel() == 0:
        for gradient in small:
            if gradient is not None:
                gradient.zero_()
        return dx, *small
    out = dx
    written: tuple[Maybe, ...] = small
    backend = _backend(x)
    shape = _shapes.get(_key(backend, x, num_groups, weight, bias, eps, scale, shift, add, silu))
    if shape is None:
        shape, out, x, weight, bias, scale, shift, add = _prepare(
            backend, dx, x, num_groups, weight, bias, eps, scale, shift, add, silu
        )
        # The kernel writes in the dtypes it reads, which _prepare may have widened.
        likes = (weight, bias, scale, shift, add)
        written = tuple(
            None if gradient is None or like is None else gradient.to(like.dtype)
            for gradient, like in zip(small, likes, strict=True)
        )
    if dy.stride() != out.stride():
        dy = torch.empty_like(out).copy_(dy)
    if backend == "native":
        native.library().group_norm_silu_backward_cpu(
            shape, dy.data_ptr(), x.data_ptr(), address(weight), address(bias), address(scale),
            address(shift), address(add), statistics.data_ptr(), out.data_ptr(),
            *map(address, written), torch.get_num_threads(),
        )  # fmt: skip
    elif backend == "cuda":
        _group_norm_cuda.backward(
            shape, dy, x, weight, bias, scale, shift, add, statistics, out, written
        )
    else:
        mean, rstd = statistics.unbind()
        _triton_backward(
            dy, x, num_groups, weight, bias, mean, rstd, scale, shift, add, silu, out, written
        )
    if out is not dx:
        dx.copy_(out)
    for gradient, result in zip(small, written, strict=True):
        if gradient is not None and result is not None and result is not gradient:
            gradient.copy_(result)
    return dx, *small


def _room(like: Maybe) -> Maybe:
    return None if like is None else torch.empty_like(like, memory_format=torch.contiguous_format)


def operator_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """``backward`` as an operator answers: an empty tensor in the place of None."""
    gradients = backward(*arguments)
    x = arguments[2]
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def fake_backward(
    dy: Tensor, statistics: Tensor, x: Tensor, num_groups: int, weight: Maybe, bias: Maybe,
    eps: float, scale: Maybe, shift: Maybe, add: Maybe, silu: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What ``operator_backward`` returns, without values."""
    dadd = None if add is None or add.shape == x.shape else _room(add)
    small = (_room(weight), _room(bias), _room(scale), _room(shift), dadd)
    empty = (x.new_empty(0) if gradient is None else gradient for gradient in small)
    return torch.empty_like(x), *empty


def _triton_backward(
    dy: Tensor, x: Tensor, num_groups: int, weight: Maybe, bias: Maybe, mean: Tensor, rstd: Tensor,
    scale: Maybe, shift: Maybe, add: Maybe, silu: bool, dx: Tensor, small: tuple[Maybe, ...],
) -> None:  # fmt: skip
    """The kernel gives Σ dv, Σ dv·x̂ and Σ dx over the positions; the rest is (N, C) arithmetic."""
    from fastdiff.kernels import group_norm_silu as kernels

    sums = x.new_empty((3, *x.shape[:2]), dtype=torch.float32)
    with backends.device_of(x):
        kernels.backward(
            dy, x, num_groups, weight, bias, mean, rstd, scale, shift, add, silu, dx, sums
        )
    dv, dv_xhat, dx_sum = sums.unbind()
    dweight, dbias, dscale, dshift, dadd = small
    if dweight is not None and dbias is not None:
        share = 1.0 if scale is None else 1 + scale.float()
        dweight.copy_((dv_xhat * share).sum(0))
        dbias.copy_((dv * share).sum(0))
    if dscale is not None and dshift is not None:  # v = u·(1 + scale) + shift, u = x̂·weight + bias
        if weight is not None and bias is not None:
            dv_xhat = dv_xhat * weight.float() + dv * bias.float()
        dscale.copy_(dv_xhat)
        dshift.copy_(dv)
    if dadd is not None:
        dadd.copy_(dx_sum)


# Arguments that need no conversion are recognised by what decides it: the kind of device, sizes,
# strides and dtypes.
_shapes: dict[tuple[Any, ...], Any] = {}


def _key(
    backend: str, x: Tensor, num_groups: int, weight: Maybe, bias: Maybe, eps: float,
    scale: Maybe, shift: Maybe, add: Maybe, silu: bool,
) -> tuple[Any, ...]:  # fmt: skip
    return (
        backend, x.shape, x.stride(), x.dtype, num_groups, eps, silu,
        None if weight is None or bias is None else
        (weight.dtype, weight.stride(), bias.dtype, bias.stride()),
        None if scale is None or shift is None else
        (scale.dtype, scale.stride(), shift.dtype, shift.stride()),
        None if add is None else (add.shape, add.dtype, add.stride()),
    )  # fmt: skip


def _prepare(
    backend: str, out: Tensor, x: Tensor, num_groups: int, weight: Maybe, bias: Maybe, eps: float,
    scale: Maybe, shift: Maybe, add: Maybe, silu: bool,
) -> tuple[Any, Tensor, Tensor, Maybe, Maybe, Maybe, Maybe, Maybe]:  # fmt: skip
    """(shape, out, x, weight, bias, scale, shift, add) as the kernels take them."""
    key = _key(backend, x, num_groups, weight, bias, eps, scale, shift, add, silu)
    values, unchanged = _convert(out, x, weight, bias, scale, shift, add)
    out, x, weight, bias, scale, shift, add = values
    shape: Any = ()
    if backend != "triton":
        shape = _native_shape(x, num_groups, weight, eps, scale, shift, add, silu)
    if unchanged:
        remember(_shapes, key, shape)
    return shape, out, x, weight, bias, scale, shift, add


def _convert(
    out: Tensor, x: Tensor, weight: Maybe, bias: Maybe, scale: Maybe, shift: Maybe, add: Maybe
) -> tuple[tuple[Any, ...], bool]:
    """The arguments, with copies of what no kernel reads as it stands (strange strides, mixed and
    wide dtypes), and whether there was no such."""
    before = (out, x, weight, bias, scale, shift, add)
    if not (out.is_contiguous() or is_channels_last(out)):
        out = torch.empty_like(out, memory_format=torch.contiguous_format)
    residual = add is not None and add.shape == x.shape
    x = in_layout_of(out, x)
    weight, bias = rows(weight, bias)
    scale, shift = rows(scale, shift)
    if add is not None:
        add = in_layout_of(out, add) if residual else rows(add, add)[0]
    after = (out, x, weight, bias, scale, shift, add)
    return after, all(a is b for a, b in zip(before, after, strict=True))


def _native_shape(
    x: Tensor, num_groups: int, weight: Maybe, eps: float, scale: Maybe, shift: Maybe,
    add: Maybe, silu: bool,
) -> Any:  # fmt: skip
    codes = native.DTYPE_CODES
    n, channels = x.shape[:2]
    positions = x.numel() // (n * channels)
    embedding = add is not None and add.shape != x.shape
    return native.library().GroupNormShape(
        samples=n,
        channels=channels,
        positions=positions,
        groups=num_groups,
        # One position: channels are neighbours, which only the channels_last kernel vectorises.
        channels_last=positions == 1 or not x.is_contiguous(),
        silu=silu,
        eps=eps,
        add=0 if add is None else 1 if embedding else 2,
        dtype=codes[x.dtype],
        affine_dtype=0 if weight is None else codes[weight.dtype],
        film_dtype=0 if scale is None else codes[scale.dtype],
        add_dtype=0 if add is None else codes[add.dtype],
        scale_stride=0 if scale is None else scale.stride(0),
        shift_stride=0 if shift is None else shift.stride(0),
        add_stride=add.stride(0) if add is not None and embedding else 0,
    )


def _backend(x: Tensor) -> str:
    """The kernels that serve x: those that are named, or the plan's."""
    name = backends.named()
    if name in ("cuda", "triton"):
        return name
    return backends.default(x.device, x.dtype, "group_norm_silu")

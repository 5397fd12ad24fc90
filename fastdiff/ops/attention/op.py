"""Attention on the qkv projection of the published U-Nets in one call."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import backends, dispatch, native
from fastdiff.ops.attention import reference
from fastdiff.ops.attention.fastest import Workload, fastest
from fastdiff.ops.checks import refusal
from fastdiff.ops.convolution.fastest import Products, products_of, units
from fastdiff.ops.differentiable import Kernel, Launch, differentiable_once
from fastdiff.ops.dispatch import OPERATIONS, Choice, Operation
from fastdiff.ops.layouts import Maybe
from fastdiff.ops.native import address

OP = "attention"


def attention(qkv: Tensor, num_heads: int, *, order: str = "heads_first") -> Tensor:
    """``softmax(q·kᵀ / sqrt(head_dim))·v`` for every head, read from the projection's own layout.

    Args:
        qkv: (N, 3C, T). Any layout is read as it stands: channel-major, the output of a 1×1
            convolution, or token-major, a transposed (N, T, 3C), which is faster and what a
            channels_last image gives without a copy.
        num_heads: divides C; head_dim is C / num_heads.
        order: how the 3C rows are arranged: ``"heads_first"`` is [h0q, h0k, h0v, h1q, …]
            (improved-diffusion, and guided-diffusion by default), ``"qkv_first"`` is [Q | K | V]
            (guided-diffusion with ``use_new_attention_order``). The shapes are the same, so a
            wrong choice gives wrong numbers and no error.

    Returns:
        (N, C, T) in the dtype of ``qkv``, token-major: its transpose (N, T, C) is contiguous.
        The softmax and the sums are float32, float64 for float64.

    Raises:
        InputError: a shape, dtype or name that does not fit, and a second derivative, which only
            the reference has.

    Source: Vaswani et al. 2017, equation 1.
    """
    _check(qkv, num_heads, order)
    return run(_choose(qkv, num_heads).backend, qkv, num_heads, order)


def _check(qkv: Tensor, num_heads: int, order: str) -> None:
    if not isinstance(qkv, Tensor) or qkv.dim() != 3 or not qkv.is_floating_point():
        raise refusal(OP, "qkv", qkv, "a floating-point (N, 3C, T) tensor")
    if not isinstance(num_heads, int) or num_heads < 1:
        raise InputError(f"{OP}: num_heads={num_heads!r}; expected a positive integer")
    width = qkv.shape[1]
    if width == 0 or width % (3 * num_heads):
        raise InputError(
            f"{OP}: qkv has {width} rows, which is not 3 × num_heads={num_heads} × a whole head_dim"
        )
    if order not in ("heads_first", "qkv_first"):
        raise InputError(f"{OP}: order={order!r}; expected 'heads_first' or 'qkv_first'")


def choose(qkv: Tensor, num_heads: int, *, order: str = "heads_first") -> Choice:
    """What serves this call and why (``fastdiff.explain``)."""
    _check(qkv, num_heads, order)
    choice = _choose(qkv, num_heads)
    return choice if choice.backend in backends.BACKENDS else choice._replace(backend="reference")


OPERATION = OPERATIONS[OP] = Operation(OP, ("native", "triton"), choose)


def _choose(qkv: Tensor, num_heads: int) -> Choice:
    """One of IMPLEMENTATIONS in the place of the backend."""
    return dispatch.choose(OPERATION, qkv, rule=lambda: fastest(_workload(qkv, num_heads)))


def _workload(qkv: Tensor, num_heads: int) -> Workload:
    isa, tiles, amx = cpu() if qkv.is_cpu else ("", False, False)
    head_dim = qkv.shape[1] // (3 * num_heads)
    training, token_major = dispatch.wants_gradient(qkv), qkv.stride(1) == 1
    return Workload(
        qkv.device.type, qkv.dtype, qkv.shape[2], head_dim, training, token_major, isa, tiles, amx
    )


@native.constant_when_compiled
def cpu() -> tuple[str, bool, bool]:
    """The native library's instruction set, and whether it and PyTorch multiply in AMX tiles."""
    return native.library().current_isa(), units().amx, _AMX


_AMX: bool = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def run(implementation: str, qkv: Tensor, num_heads: int, order: str) -> Tensor:
    """One of IMPLEMENTATIONS, without checks."""
    if implementation == "reference":
        return reference.attention(qkv, num_heads, order=order)
    if implementation in ("sdpa", "matmuls"):
        return getattr(reference, implementation)(qkv, num_heads, order)
    training = dispatch.wants_gradient(qkv)
    return _kernel(Arguments(qkv, num_heads, order, implementation, training, False), training)[0]


class Arguments(NamedTuple):
    qkv: Tensor
    num_heads: int
    order: str
    backend: str
    keep: bool  # lse = log Σ exp(scores), for a backward to come
    split: bool  # float32 may be multiplied as the sum of two bfloat16, where that is faster


def _allocate(call: Arguments) -> tuple[Tensor, Maybe]:
    n, width, tokens = call.qkv.shape
    out = call.qkv.new_empty(n, tokens, width // 3).transpose(1, 2)
    if not call.keep:
        return out, None
    return out, call.qkv.new_empty(n, call.num_heads, tokens, dtype=torch.float32)


def _forward(call: Arguments) -> Any:
    """What fills out and lse for calls like this one."""
    if call.backend != "triton":
        return _of_library("attention_forward", call)
    from fastdiff.kernels import attention as kernels

    return kernels.forward(call.qkv, call.num_heads, call.order, _allocate(call)[0])


def _backward(call: Any) -> Any:
    """What fills the gradient of qkv for calls like this one."""
    if call.backend == "triton":
        from fastdiff.kernels import attention as kernels

        rest = (call.out, _adjacent(call.grad), torch.empty_like(call.qkv))
        fill = kernels.backward(call.qkv, call.num_heads, call.order, *rest)
    else:
        fill = _of_library("attention_backward", call)
    return lambda grad, out, lse, qkv, grad_qkv: fill(qkv, out, lse, _adjacent(grad), grad_qkv)


def _adjacent(grad: Tensor) -> Tensor:
    return grad if 1 in grad.stride()[1:] else grad.contiguous()  # an expanded one, from a sum


def _of_library(name: str, call: Any) -> Any:
    """The C++ kernel for qkv, out, lse and, backwards, the gradients of out and qkv."""
    heads, library = call.num_heads, native.library()
    n, width, tokens = call.qkv.shape
    head_dim = width // (3 * heads)
    # Rows from a head's q to the next head's, and from q to k, and on to v.
    rows = (3 * head_dim, head_dim) if call.order == "heads_first" else (head_dim, heads * head_dim)
    dtype = call.qkv.dtype
    exact = dtype == torch.float32 and not call.split
    products = Products.FLOAT32 if exact else products_of(dtype)
    described = (native.DTYPE_CODES[dtype], int(products), n, heads, tokens, head_dim, *rows)

    def prepared(qkv: Tensor, out: Tensor, lse: Maybe, *gradients: Tensor) -> Callable[[], None]:
        places = (qkv.data_ptr(), qkv.stride(), out.data_ptr(), out.stride(), address(lse))
        problem = library.Attention(*described, *places)
        rest = (value for v in gradients for value in (v.data_ptr(), v.stride()))
        return native.in_threads(
            partial(getattr(library, f"{name}_cpu"), problem, *rest),
            partial(library.attention_workspace, problem, bool(gradients)),
        )

    return Launch(prepared)


_kernel = Kernel(OP, Arguments, _allocate, _forward, outputs=2)
bound = _kernel.bound


def _allocate_gradient(call: Any) -> tuple[Tensor]:
    return (torch.empty_like(call.qkv),)


differentiable_once(_kernel, _allocate_gradient, _backward, keeps={"out": 0, "lse": 1})

"""Attention on the qkv projection of the published U-Nets in one call."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import backends, dispatch, native
from fastdiff.ops.attention.fastest import Workload, fastest
from fastdiff.ops.attention.reference import attention as reference_attention
from fastdiff.ops.attention.reference import join_heads, split_heads
from fastdiff.ops.differentiable import Kernel, differentiable_once
from fastdiff.ops.dispatch import Choice
from fastdiff.ops.layouts import Maybe, address

ORDERS = ("heads_first", "qkv_first")


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
    if not isinstance(qkv, Tensor):
        raise InputError(
            f"attention: qkv is a {type(qkv).__name__}; expected a floating-point (N, 3C, T) tensor"
        )
    if qkv.dim() != 3 or not qkv.is_floating_point():
        raise InputError(
            f"attention: qkv is {tuple(qkv.shape)} {backends.short(qkv.dtype)}; "
            "expected a floating-point (N, 3C, T) tensor"
        )
    if not isinstance(num_heads, int) or num_heads < 1:
        raise InputError(f"attention: num_heads={num_heads!r}; expected a positive integer")
    if qkv.shape[1] == 0 or qkv.shape[1] % (3 * num_heads):
        raise InputError(
            f"attention: qkv has {qkv.shape[1]} rows, which is not 3 × num_heads={num_heads} "
            "× a whole head_dim"
        )
    if order not in ORDERS:
        raise InputError(f"attention: order={order!r}; expected 'heads_first' or 'qkv_first'")


# --- Choosing ---------------------------------------------------------------------------------


def choose(qkv: Tensor, num_heads: int, *, order: str = "heads_first") -> Choice:
    """What serves this call and why (``fastdiff.explain``)."""
    _check(qkv, num_heads, order)
    choice = _choose(qkv, num_heads)
    return choice if choice.backend in backends.BACKENDS else choice._replace(backend="reference")


OPERATION = dispatch.register("attention", choose, kernels=("native", "triton"))


def _choose(qkv: Tensor, num_heads: int) -> Choice:
    """One of IMPLEMENTATIONS in the place of the backend."""
    return dispatch.choose(OPERATION, qkv, rule=lambda: fastest(_workload(qkv, num_heads)))


def _workload(qkv: Tensor, num_heads: int) -> Workload:
    isa, amx = cpu() if qkv.device.type == "cpu" else ("", False)
    return Workload(
        qkv.device.type,
        qkv.dtype,
        tokens=qkv.shape[2],
        head_dim=qkv.shape[1] // (3 * num_heads),
        training=dispatch.wants_gradient(qkv),
        token_major=qkv.stride(1) == 1,
        isa=isa,
        amx=amx,
    )


@native.constant_when_compiled
def cpu() -> tuple[str, bool]:
    """The native library's instruction set, and whether PyTorch multiplies in AMX tiles."""
    return native.library().current_isa(), _AMX


_AMX: bool = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


# --- Launching --------------------------------------------------------------------------------


def run(implementation: str, qkv: Tensor, num_heads: int, order: str) -> Tensor:
    """One of IMPLEMENTATIONS, without checks."""
    if implementation == "reference":
        return reference_attention(qkv, num_heads, order=order)
    if implementation == "sdpa":
        return scaled_dot_product(qkv, num_heads, order)
    if implementation == "matmuls":
        return written_out(qkv, num_heads, order)
    training = dispatch.wants_gradient(qkv)
    out = _kernel(Arguments(qkv, num_heads, order, implementation, training), training)[0]
    assert out is not None
    return out


def scaled_dot_product(qkv: Tensor, num_heads: int, order: str) -> Tensor:
    """PyTorch's own fused attention; under autocast in autocast's dtype."""
    q, k, v = split_heads(qkv, num_heads, order)
    return join_heads(F.scaled_dot_product_attention(q, k, v)).to(qkv.dtype)


def written_out(qkv: Tensor, num_heads: int, order: str) -> Tensor:
    """Two matrix products and a softmax in qkv's own dtype: PyTorch's fused CPU backward is slow
    in half precision."""
    q, k, v = split_heads(qkv, num_heads, order)
    weights = torch.softmax((q * q.shape[3] ** -0.5) @ k.transpose(2, 3), dim=3)
    return join_heads(weights @ v).to(qkv.dtype)


class Arguments(NamedTuple):
    qkv: Tensor
    num_heads: int
    order: str
    backend: str
    keep: bool  # lse = log Σ exp(scores), for a backward to come


class Backward(NamedTuple):
    grad: Tensor
    out: Tensor
    lse: Tensor
    call: Arguments


def _allocate(call: Arguments) -> tuple[Tensor, Maybe]:
    n, width, tokens = call.qkv.shape
    out = call.qkv.new_empty(n, tokens, width // 3).transpose(1, 2)
    if not call.keep:
        return out, None
    return out, call.qkv.new_empty(n, call.num_heads, tokens, dtype=torch.float32)


def _launch(call: Arguments, out: Tensor, lse: Maybe) -> None:
    if call.backend == "triton":
        import fastdiff.kernels.attention as kernels

        with backends.device_of(out):
            kernels.forward(call.qkv, call.num_heads, call.order, out, lse)
        return
    library, threads = native.library(), torch.get_num_threads()
    problem = _problem(library, call, out, lse)
    workspace = _borrow(library.attention_workspace(problem, False, threads))
    library.attention_forward_cpu(problem, workspace.data_ptr(), threads)
    _give_back(workspace)


def _launch_backward(call: Backward, grad_qkv: Tensor) -> None:
    grad, out, lse, forward = call
    if 1 not in grad.stride()[1:]:  # an expanded one, from a sum
        grad = grad.contiguous()
    if forward.backend == "triton":
        import fastdiff.kernels.attention as kernels

        with backends.device_of(out):
            kernels.backward(
                forward.qkv, forward.num_heads, forward.order, out, lse, grad, grad_qkv
            )
        return
    library, threads = native.library(), torch.get_num_threads()
    problem = _problem(library, forward, out, lse)
    workspace = _borrow(library.attention_workspace(problem, True, threads))
    library.attention_backward_cpu(
        problem,
        grad.data_ptr(),
        grad.stride(),
        grad_qkv.data_ptr(),
        grad_qkv.stride(),
        workspace.data_ptr(),
        threads,
    )
    _give_back(workspace)


def _problem(library: Any, call: Arguments, out: Tensor, lse: Maybe) -> Any:
    """``Attention`` of csrc/common/attention.h."""
    qkv, heads = call.qkv, call.num_heads
    n, width, tokens = qkv.shape
    head_dim = width // (3 * heads)
    heads_first = call.order == "heads_first"
    return library.Attention(
        native.DTYPE_CODES[qkv.dtype],
        n,
        heads,
        tokens,
        head_dim,
        3 * head_dim if heads_first else head_dim,  # rows from a head's q to the next head's
        head_dim if heads_first else heads * head_dim,  # rows from q to k, and on to v
        qkv.data_ptr(),
        qkv.stride(),
        out.data_ptr(),
        out.stride(),
        address(lse),
    )


# Scratch memory that no call uses now: a fresh one may come from the system page by page, zeroed,
# which was measured to cost a tenth of a call. A list's pop and append are atomic.
_IDLE: list[Tensor] = []
_KEPT_FLOATS = 1 << 23  # 32 MiB; what is larger goes back


def _borrow(floats: int) -> Tensor:
    try:
        workspace = _IDLE.pop()
    except IndexError:
        workspace = None
    if workspace is None or workspace.numel() < floats:
        workspace = torch.empty(floats, dtype=torch.float32)
    return workspace


def _give_back(workspace: Tensor) -> None:
    if workspace.numel() <= _KEPT_FLOATS:
        _IDLE.append(workspace)


_kernel = Kernel("attention", Arguments, _allocate, _launch, outputs=2)
_backward = Kernel(
    "attention_backward",
    Backward,
    lambda call: (torch.empty_like(call.call.qkv),),
    _launch_backward,
    outputs=1,
)
differentiable_once(_kernel, _backward, keeps=(0, 1))

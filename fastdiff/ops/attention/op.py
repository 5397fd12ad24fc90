"""Attention on the qkv projection of the published U-Nets in one call."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import backends, native
from fastdiff.ops.attention.plan import Call, plan
from fastdiff.ops.attention.reference import attention as reference_attention
from fastdiff.ops.attention.reference import join_heads, split_heads
from fastdiff.ops.backends import Choice

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
    return run(_implementation(qkv, num_heads)[0], qkv, num_heads, order)


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
    implementation, reason = _implementation(qkv, num_heads)
    kernels = implementation in backends.BACKENDS
    return Choice("attention", implementation if kernels else "reference", reason)


def _implementation(qkv: Tensor, num_heads: int) -> tuple[str, str]:
    device_type, dtype = qkv.device.type, qkv.dtype
    name = backends.named()
    if backends.transforms():
        return backends.under_transforms("attention"), backends.TRANSFORMS_REASON
    if name is not None:
        return backends.require("attention", name, qkv.device, dtype), backends.NAMED_REASON
    isa, amx = cpu() if device_type == "cpu" else ("", False)
    call = Call(
        device_type,
        dtype,
        tokens=qkv.shape[2],
        head_dim=qkv.shape[1] // (3 * num_heads),
        training=qkv.requires_grad and torch.is_grad_enabled(),
        token_major=qkv.stride(1) == 1,
        isa=isa,
        amx=amx,
    )
    return plan(call)


@native.constant_when_compiled
def cpu() -> tuple[str, bool]:
    """The native library's instruction set, and whether PyTorch multiplies in AMX tiles."""
    return native.library().current_isa(), _AMX


_AMX: bool = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


# --- Launching --------------------------------------------------------------------------------


def run(implementation: str, qkv: Tensor, num_heads: int, order: str) -> Tensor:
    """One implementation of the plan's, without checks."""
    if implementation == "reference":
        return reference_attention(qkv, num_heads, order=order)
    if implementation == "sdpa":
        return scaled_dot_product(qkv, num_heads, order)
    if implementation == "matmuls":
        return written_out(qkv, num_heads, order)
    wants_gradient = qkv.requires_grad and torch.is_grad_enabled()
    if not backends.launches_directly(qkv):
        if wants_gradient:
            return _forward(qkv, num_heads, order)[0]
        return _inference(qkv, num_heads, order)
    function = _Attention.apply if wants_gradient else _launch_inference
    return function(qkv, num_heads, order)


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


def _allocate(qkv: Tensor, num_heads: int, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    n, width, tokens = qkv.shape
    out = qkv.new_empty(n, tokens, width // 3).transpose(1, 2)
    lse = qkv.new_empty(n, num_heads, tokens, dtype=torch.float32) if with_lse else None
    return out, lse


def _launch(qkv: Tensor, num_heads: int, order: str, with_lse: bool) -> tuple[Tensor, Any]:
    out, lse = _allocate(qkv, num_heads, with_lse)
    if out.numel() == 0:
        return out, lse
    if _uses_triton(qkv):
        import fastdiff.kernels.attention as kernels

        with backends.device_of(qkv):
            kernels.forward(qkv, num_heads, order, out, lse)
        return out, lse
    library, threads = native.library(), torch.get_num_threads()
    problem = _problem(library, qkv, num_heads, order, out, lse)
    workspace = _borrow(library.attention_workspace(problem, False, threads))
    library.attention_forward_cpu(problem, workspace.data_ptr(), threads)
    _give_back(workspace)
    return out, lse


def _launch_inference(qkv: Tensor, num_heads: int, order: str) -> Tensor:
    return _launch(qkv, num_heads, order, False)[0]


def _launch_forward(qkv: Tensor, num_heads: int, order: str) -> tuple[Tensor, Tensor]:
    return _launch(qkv, num_heads, order, True)


def _launch_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, order: str
) -> Tensor:
    grad_qkv = torch.empty_like(qkv)
    if out.numel() == 0:
        return grad_qkv
    if 1 not in grad_out.stride()[1:]:  # an expanded one, from a sum
        grad_out = grad_out.contiguous()
    if _uses_triton(qkv):
        import fastdiff.kernels.attention as kernels

        with backends.device_of(qkv):
            kernels.backward(qkv, num_heads, order, out, lse, grad_out, grad_qkv)
        return grad_qkv
    library, threads = native.library(), torch.get_num_threads()
    problem = _problem(library, qkv, num_heads, order, out, lse)
    workspace = _borrow(library.attention_workspace(problem, True, threads))
    library.attention_backward_cpu(
        problem,
        grad_out.data_ptr(),
        grad_out.stride(),
        grad_qkv.data_ptr(),
        grad_qkv.stride(),
        workspace.data_ptr(),
        threads,
    )
    _give_back(workspace)
    return grad_qkv


def _uses_triton(qkv: Tensor) -> bool:
    return qkv.device.type == "cuda" or backends.named() == "triton"


def _problem(
    library: Any, qkv: Tensor, num_heads: int, order: str, out: Tensor, lse: Tensor | None
) -> Any:
    """``Attention`` of csrc/common/attention.h."""
    n, width, tokens = qkv.shape
    head_dim = width // (3 * num_heads)
    heads_first = order == "heads_first"
    return library.Attention(
        native.DTYPE_CODES[qkv.dtype],
        n,
        num_heads,
        tokens,
        head_dim,
        3 * head_dim if heads_first else head_dim,  # rows from a head's q to the next head's
        head_dim if heads_first else num_heads * head_dim,  # rows from q to k, and on to v
        qkv.data_ptr(),
        qkv.stride(),
        out.data_ptr(),
        out.stride(),
        0 if lse is None else lse.data_ptr(),
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


# --- torch.library and autograd ---------------------------------------------------------------

_LIBRARY = torch.library.Library("fastdiff", "FRAGMENT")
_LIBRARY.define("attention_inference(Tensor qkv, int num_heads, str order) -> Tensor")
_LIBRARY.define("attention(Tensor qkv, int num_heads, str order) -> (Tensor out, Tensor lse)")
_LIBRARY.define(
    "attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int num_heads, "
    "str order) -> Tensor"
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("attention_inference", _launch_inference, _device)
    _LIBRARY.impl("attention", _launch_forward, _device)
    _LIBRARY.impl("attention_backward", _launch_backward, _device)
_inference = torch.ops.fastdiff.attention_inference.default
_forward = torch.ops.fastdiff.attention.default
_backward = torch.ops.fastdiff.attention_backward.default


@torch.library.register_fake("fastdiff::attention_inference")
def _(qkv: Tensor, num_heads: int, order: str) -> Tensor:
    return _allocate(qkv, num_heads, False)[0]


@torch.library.register_fake("fastdiff::attention")
def _(qkv: Tensor, num_heads: int, order: str) -> tuple[Tensor, Any]:
    return _allocate(qkv, num_heads, True)


@torch.library.register_fake("fastdiff::attention_backward")
def _(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, order: str
) -> Tensor:
    return torch.empty_like(qkv)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.num_heads, ctx.order = inputs
    ctx.save_for_backward(qkv, *output)


def _gradients(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor, None, None]:
    arguments = (grad_out, *ctx.saved_tensors, ctx.num_heads, ctx.order)
    if not backends.launches_backward_directly(grad_out):
        grad_qkv = _backward(*arguments)
    elif torch.is_grad_enabled():  # create_graph=True
        grad_qkv = _Once.apply(*arguments)
    else:
        grad_qkv = _launch_backward(*arguments)
    return grad_qkv, None, None


torch.library.register_autograd(
    "fastdiff::attention", _gradients, setup_context=_setup_context, lib=_LIBRARY
)


class _Attention(torch.autograd.Function):
    """The same formula in eager mode, for a third of what register_autograd costs per call.

    It takes ctx in forward: a setup_context of its own would cost as much again.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _launch_forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output[0]

    backward = staticmethod(_gradients)


def _refuse(ctx: Any, *_: Any) -> Any:
    raise InputError(
        "attention: the kernels have no second derivative; compute it with "
        "fastdiff.backend('reference')"
    )


torch.library.register_autograd("fastdiff::attention_backward", _refuse, lib=_LIBRARY)


class _Once(torch.autograd.Function):
    """The backward where somebody keeps its graph: a second derivative is refused."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        return _launch_backward(*arguments)

    backward = staticmethod(_refuse)

"""RMS norm over the channels + FiLM + SiLU in one call."""

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import backends
from fastdiff.ops.backends import Choice, short
from fastdiff.ops.rms_norm_silu import launch as launch
from fastdiff.ops.rms_norm_silu import reference as reference

OP = "rms_norm_silu"


def rms_norm_silu(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-12,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """``silu(x / max(‖x‖, eps)·√C·weight·(1 + scale) + shift)``, ‖x‖ over each position's channels.

    Args:
        x: (N, C, *spatial), any number of spatial dimensions and any layout; the result has both.
        weight: C elements in any shape, (C,) and (1, C, 1, 1) among them.
        eps: the least norm to divide by.
        scale: (N, C) or (N, C, 1, ...), or None, like shift, for no FiLM.
        shift: likewise, given exactly when scale is.
        activation: ``"silu"``, or None for the norm (and FiLM) alone.

    Returns:
        (N, C, *spatial) in the dtype of ``x``, also under autocast; the arithmetic is float32.

    Gradients are the reference's alone. Raises InputError for shapes, dtypes, devices or names that
    do not fit.

    Source: Zhang & Sennrich 2019, equation 4, over the channels as denoising-diffusion-pytorch has
    it; FiLM as in Nichol & Dhariwal 2021, section 3.
    """
    _check(x, weight, scale, shift, activation)
    backend, _ = _choose(x, weight, scale, shift)
    if backend == "reference":
        return reference.rms_norm_silu(
            x, weight, eps=eps, scale=scale, shift=shift, activation=activation
        )
    directly = backends.launches_directly(x, weight, scale, shift)
    run = launch.forward if directly else _operator
    return run(x, weight, eps, scale, shift, activation is not None, backend)


def choose(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-12,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
) -> Choice:
    """Which backend serves this call, and why (``fastdiff.explain``)."""
    return Choice(OP, *_choose(x, weight, scale, shift))


def _choose(x: Tensor, *others: Tensor | None) -> tuple[str, str]:
    """(backend, reason)."""
    if backends.transforms():
        return backends.under_transforms(OP), backends.TRANSFORMS_REASON
    name = backends.named()
    tracked = torch.is_grad_enabled() and _any_requires_grad(x, *others)
    if name is None:
        if tracked:
            return "reference", "only it is differentiable, and a gradient is wanted"
        of_call = (x.device, x.dtype, OP)
        return backends.default(*of_call), backends.default_reason(*of_call)
    if tracked and name != "reference":
        raise InputError(
            f"{OP}: the backend {name!r} was named, but its kernel has no gradients and a tensor "
            "requires grad; use torch.no_grad(), or name 'reference'"
        )
    return backends.require(OP, name, x.device, x.dtype), backends.NAMED_REASON


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return True
    return False


# --- torch.library ----------------------------------------------------------------------------

_LIBRARY = torch.library.Library("fastdiff", "FRAGMENT")
_LIBRARY.define(
    "rms_norm_silu(Tensor x, Tensor weight, float eps, Tensor? scale, Tensor? shift, bool silu, "
    "str backend) -> Tensor"
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl(OP, launch.forward, _device)
_operator = torch.ops.fastdiff.rms_norm_silu.default


@torch.library.register_fake("fastdiff::rms_norm_silu", lib=_LIBRARY)
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


# --- Checks -----------------------------------------------------------------------------------


def _check(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str | None
) -> None:
    if not isinstance(x, Tensor):
        raise _no_tensor("x", x)
    shape = x.shape
    if len(shape) < 2 or not x.is_floating_point():
        raise InputError(f"{OP}: x is {_describe(x)}; expected floating-point (N, C, *spatial)")
    channels = shape[1]
    _check_floats("weight", weight, x)
    if weight.numel() != channels:
        raise InputError(
            f"{OP}: weight is {_describe(weight)}; expected {channels} elements, one for each "
            "channel of x"
        )
    if (scale is None) != (shift is None):
        raise InputError(f"{OP}: give both scale and shift, or neither")
    if scale is not None:
        _check_rows("scale", scale, x)
        _check_rows("shift", shift, x)
    if activation is not None and activation != "silu":
        raise InputError(f"{OP}: activation={activation!r}; expected 'silu' or None")


def _check_rows(name: str, tensor: Tensor | None, x: Tensor) -> None:
    """(N, C), or the same with ones for x's positions."""
    tensor = _check_floats(name, tensor, x)
    rows = tuple(x.shape[:2])
    if tensor.shape != rows:
        broadcast = rows + (1,) * (x.dim() - 2)
        if tensor.shape != broadcast:
            raise InputError(
                f"{OP}: {name} is {_describe(tensor)}; expected floating-point {rows} or "
                f"{broadcast}"
            )


def _check_floats(name: str, tensor: Tensor | None, x: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise _no_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise InputError(f"{OP}: {name} is {_describe(tensor)}; expected a floating-point tensor")
    if tensor.device != x.device:
        raise InputError(
            f"{OP}: {name} is on {tensor.device} but x is on {x.device}: move one of them"
        )
    return tensor


def _no_tensor(name: str, value: object) -> InputError:
    return InputError(f"{OP}: {name} is a {type(value).__name__}; expected a tensor")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {short(tensor.dtype)}"

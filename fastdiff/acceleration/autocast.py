"""A whole model under autocast of a lower dtype."""

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.acceleration.fused_class import Fusion


def under_autocast(model: nn.Module, dtype: torch.dtype) -> Fusion:
    """The model's forward, whatever it is now, under autocast; float outputs in the first tensor's
    dtype."""
    options = (("inner", type(model)), ("dtype", dtype))
    return Fusion(f"autocast of {dtype}", _forward, options=options, wraps=True)


def _forward(
    self: nn.Module, *args: Any, inner: type[nn.Module], dtype: torch.dtype, **kwargs: Any
) -> Any:
    tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
    x = next((a for a in tensors if a.is_floating_point()), None)
    if x is None:
        return inner.forward(self, *args, **kwargs)
    with torch.autocast(x.device.type, dtype):
        output = inner.forward(self, *args, **kwargs)
    return _cast(output, x.dtype)


def _cast(output: Any, dtype: torch.dtype) -> Any:
    if isinstance(output, Tensor):
        return output.to(dtype) if output.is_floating_point() else output
    if isinstance(output, tuple | list) and not hasattr(output, "_fields"):
        return type(output)(_cast(part, dtype) for part in output)
    if isinstance(getattr(output, "sample", None), Tensor):
        output.sample = output.sample.to(dtype)
    return output

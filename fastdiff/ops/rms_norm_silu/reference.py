"""RMS norm over the channels, FiLM and SiLU as the papers write them, in plain PyTorch.

- h = x / rms(x) · weight, rms(x) = ‖x‖ / √C over the channels: Zhang & Sennrich 2019, equation 4;
  ‖x‖ is held above eps as in F.normalize
- h = h · (1 + scale) + shift: FiLM, Nichol & Dhariwal 2021, section 3
- y = h · sigmoid(h): SiLU
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.arithmetic import arithmetic, laid_out_like


def rms_norm_silu(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-12,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """See ``fastdiff.ops.rms_norm_silu``. Float32 for any dtype of ``x`` but float64."""
    dtype = arithmetic(x.dtype)
    n, channels = x.shape[:2]
    ones = (1,) * (x.dim() - 2)
    gain = weight.to(dtype).reshape(channels, *ones) * channels**0.5
    h = F.normalize(x.to(dtype), dim=1, eps=eps) * gain
    if scale is not None and shift is not None:
        scale, shift = (t.to(dtype).reshape(n, channels, *ones) for t in (scale, shift))
        h = torch.addcmul(shift, h, 1 + scale)
    if activation == "silu":
        # In place only where no gradient wants the value before the activation.
        h = F.silu(h, inplace=not h.requires_grad)
    return laid_out_like(h.to(x.dtype), x)

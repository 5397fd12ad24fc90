"""How many operations networks take: convolutions, matrix products and attention, two operations to
each multiplication and addition, as ``torch.utils.flop_counter`` counts them.

Of fastdiff's operations attention and a training's convolutions count. The others go once over
their tensors, and like torch's own norms and activations count nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastdiff.models.unet import UNet
from fastdiff.models.valueless import valueless
from fastdiff.ops import backends


def flops(call: Callable[[], Any]) -> int:
    """The operations of what ``call()`` computes, on any device, the meta device too."""
    # Here, as it loads Triton.
    from torch.utils.flop_counter import FlopCounterMode

    ours = torch.ops.fastdiff
    formulas = {
        ours.attention: _attention,
        ours.attention_backward: _attention_backward,
        ours.convolution_training: _convolution,
        ours.convolution_training_backward: _convolution_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        call()
    return counter.get_total_flops()


def unet_flops(
    arguments: Mapping[str, Any], image_size: int | Sequence[int], *, training: bool = False
) -> int:
    """Of one image of this side, or of (H, W), in a forward pass of ``UNet(**arguments)``, a 2-D
    network without low_res; ``training``: and in the backward pass.

    Twice the multiply-accumulates that papers count. It takes no memory and computes nothing.
    InputError for arguments that do not fit together.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    # A backend that is named may have nothing for the meta device; plain operations count the same.
    with backends.backend(None), valueless(), torch.set_grad_enabled(training):
        model = UNet(**arguments)
        x, t = torch.empty(1, model.in_channels, *size), torch.empty(1)
        y = None if model.num_classes is None else torch.empty(1, dtype=torch.int64)

        def passes() -> None:
            answer = model(x, t, y)
            if training:
                answer.sum().backward()

        return flops(passes)


def _attention(qkv: Sequence[int], *others: Any, **named: Any) -> int:
    """Of qkv (N, 3C, T): q·kᵀ and the product with v, N·C·T² multiplications each."""
    n, width, tokens = qkv
    return 2 * 2 * n * (width // 3) * tokens**2


def _convolution(
    x: Sequence[int], weight: Sequence[int], *others: Any, out_shape: Sequence[int], **named: Any
) -> int:
    """A product of each output with its taps."""
    return 2 * out_shape[0] * math.prod(out_shape[2:]) * math.prod(weight)


def _convolution_backward(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *others: Any, **named: Any
) -> int:
    """As many for each of the gradients of x and weight that is wanted."""
    *_, wants_x, wants_weight, _ = others
    return (wants_x + wants_weight) * _convolution(x, weight, out_shape=grad)


def _attention_backward(
    grad: Any, out: Any, lse: Any, qkv: Sequence[int], *others: Any, **named: Any
) -> int:
    """Five such products: the scores anew, and the gradients of v, of the scores, of q and of k."""
    return _attention(qkv) // 2 * 5

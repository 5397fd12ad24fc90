"""Weights seen in the order of their memory while an optimizer takes its step.

On the CPU torch's fused AdamW calls ``grad.contiguous()`` and makes no use of the answer
(aten/src/ATen/native/cpu/FusedAdamKernel.cpp): where weights are in channels_last that copies every
gradient, for half of the update's time (35.7M parameters, one thread: 126 ms with it, 62 without).
An update that treats all elements alike does not care for the order of the dimensions, so it is
given each tensor with its dimensions permuted to where it is contiguous.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def memory_order(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within, parameters, gradients and moments are contiguous where one permutation makes them so.

    Afterwards, whatever happens, they have their own shapes again; the memory is the same
    throughout. For an optimizer that treats all elements alike (AdamW, SGD), not for one that knows
    rows and columns.
    """
    with contextlib.ExitStack() as stack:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            order = _order(p)
            if order is not None:
                _permute(p, optimizer, order)
                back = [order.index(i) for i in range(len(order))]
                stack.callback(_permute, p, optimizer, back)
        yield


def _order(parameter: Tensor) -> list[int] | None:
    """The permutation that makes the parameter and its gradient contiguous; None where they are so
    already, or no permutation does it to both."""
    grad = parameter.grad
    if grad is None or parameter.is_contiguous() or grad.stride() != parameter.stride():
        return None
    strides = parameter.stride()
    order = sorted(range(parameter.dim()), key=lambda i: -strides[i])
    return order if parameter.permute(order).is_contiguous() else None


def _permute(parameter: Tensor, optimizer: torch.optim.Optimizer, order: list[int]) -> None:
    shape, moments = parameter.shape, optimizer.state.get(parameter, {})
    data, grad = parameter.data.permute(order), parameter.grad
    parameter.grad = None  # data of another shape than the gradient's are refused
    parameter.data = data
    parameter.grad = None if grad is None else grad.permute(order)
    for name, value in moments.items():
        if isinstance(value, Tensor) and value.shape == shape:
            moments[name] = value.permute(order)

"""The arithmetic of one training step: gradients of a batch's mean loss, part by part."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastdiff.models.shards import together
from fastdiff.training.self_condition import SelfCondition


def backward(
    diffusion: Any,
    network: Callable,
    x_start: Tensor,
    t: Tensor,
    weights: Tensor,
    kwargs: dict[str, Tensor],
    *,
    microbatch: int,
    noise: Mapping[str, Any],
    drawn: Tensor | None = None,
    self_condition: SelfCondition | None = None,
    unsynchronised: Callable[[], AbstractContextManager] = nullcontext,
    scaled: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> dict[str, Tensor]:
    """Add the gradients of the weighted mean loss; the loss terms, each (N,).

    Args:
        x_start: (N, ...); t, weights: (N,); kwargs: the network's, each (N, ...).
        microbatch: samples per forward pass; 0 takes all.
        noise: seed, step and first_sample, from which the noise is drawn: numbers, or tensors of
            one element on the device.
        drawn: (N, ...), the noise, where it is drawn already.
        self_condition: how the network is given its own estimate of x_0; None: it is not.
        scaled: what the gradients are those of, from a pass's loss.
        unsynchronised: around all passes but the last, whose gradients need not be averaged yet.
    """
    batch = len(x_start)
    size = microbatch or batch
    parts = []
    for start in range(0, batch, size):
        part = slice(start, start + size)
        run = network
        if self_condition is not None:
            run = self_condition.around(network, t[part], noise["step"])
        given: dict[str, Any] = {**noise, "first_sample": noise["first_sample"] + start}
        if drawn is not None:
            given = {"noise": drawn[part]}
        with nullcontext() if start + size >= batch else unsynchronised():
            losses = diffusion.training_losses(
                run,
                x_start[part],
                t[part],
                {name: value[part] for name, value in kwargs.items()},
                **given,
            )
            scaled((losses["loss"] * weights[part]).sum() / batch).backward()
        parts.append({name: value.detach() for name, value in losses.items()})
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def clip_gradients(parameters: Sequence[Tensor], largest: float) -> Tensor:
    """Clip the gradients' norm to ``largest`` (0: not); the norm before, a scalar on the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = together(torch.nn.utils.get_total_norm(gradients))
    if largest:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm

"""The arithmetic of one training step: gradients of a batch's mean loss, part by part."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdiff.process.gaussian import GaussianDiffusion


def autocast_to(dtype: str, device: torch.device, network: Callable) -> Callable:
    """The network, under autocast or not; the losses around it stay in float32."""
    if dtype == "float32":
        return network

    def predict(x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return network(x, t, **kwargs)

    return predict


def backward(
    diffusion: GaussianDiffusion,
    network: Callable,
    x_start: Tensor,
    t: Tensor,
    weights: Tensor,
    noise: Tensor,
    kwargs: dict[str, Tensor],
    microbatch: int,
) -> dict[str, Tensor]:
    """Add the gradients of the weighted mean loss; the loss terms, each (N,).

    Args:
        x_start, noise: (N, C, H, W); t int64 (N,); weights (N,); kwargs: the network's, each (N,).
        microbatch: images per forward pass; 0 takes all.
    """
    batch = len(x_start)
    size = microbatch or batch
    parts = []
    for part in (slice(i, i + size) for i in range(0, batch, size)):
        losses = diffusion.training_losses(
            network,
            x_start[part],
            t[part],
            {name: value[part] for name, value in kwargs.items()},
            noise=noise[part],
        )
        ((losses["loss"] * weights[part]).sum() / batch).backward()
        parts.append({name: value.detach() for name, value in losses.items()})
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def clip_gradients(parameters: Sequence[Tensor], largest: float) -> Tensor:
    """Clip the gradients' norm to ``largest`` (0: not); the norm before, a scalar on the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if largest:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm

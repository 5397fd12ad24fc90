"""Between images: how they are brought to latents, mixed there, and led back.

Shared noise is Ho et al. 2020 (figures 8 and 9): images are noised to a step, all by one draw, so
that what lies between them is as noisy as they are. Deterministic methods encode without noise, as
DDIM (Song et al. 2020, section 5.3).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_float, check_like
from fastdiff.errors import InputError
from fastdiff.methods.protocol import noise_levels
from fastdiff.ops.counters import X_T_STEP, sampling_step
from fastdiff.ops.normal import normal
from fastdiff.sampling.sampler import Sampler


def lerp(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """(1 − w)·first + w·second: (C, ...) of each, weights (M,) → (M, C, ...). Exact at 0 and 1.

    Raises InputError for two that differ in shape.
    """
    w = _weights(first, second, weights)
    return (1 - w) * first + w * second


def slerp(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """sin((1 − w)θ)/sin θ · first + sin(wθ)/sin θ · second with θ the angle between the two: it
    leaves the norm of noise what it is (Song et al. 2020, appendix D.5). Shapes and errors as
    ``lerp``'s, which also mixes two that lie on one line, or of which one is 0."""
    w = _weights(first, second, weights)
    norms = torch.linalg.vector_norm(first) * torch.linalg.vector_norm(second)
    angle = torch.arccos(((first * second).sum() / norms).clamp(-1, 1))
    sine = torch.sin(angle)
    if not bool(sine.abs() > 1e-4):
        return lerp(first, second, weights)
    return torch.sin((1 - w) * angle) / sine * first + torch.sin(w * angle) / sine * second


def _weights(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """(M, 1, ...), to broadcast over the two."""
    check_float(first, "first")
    check_like(second, "second", first, "first")
    return weights.to(first).view(-1, *(1,) * first.dim())


def encode(
    sampler: Sampler, image: Tensor, model_kwargs: Mapping[str, Any] | None = None
) -> Tensor:
    """The noise (N, C, ...) of which ``sampler`` makes ``image`` (N, C, ...), without any draw.

    ``sampler.sample(image.shape, noise=encode(sampler, image))`` is the image again up to an error
    that falls with the number of steps, by the method's order: both ways approximate one curve.
    ``model_kwargs``: the network's. The sampler's method has to be one that draws no noise, by its
    options too, over a process and without a cond_fn (InputError otherwise).
    """
    if sampler.cond_fn is not None:
        raise InputError(
            "the sampler has a cond_fn, with which no way leads back from an image to its noise; "
            "give one without"
        )
    settings, network = sampler.settings, sampler.network
    upward = Sampler(
        sampler.model,
        settings.encoding_table(sampler.diffusion),
        dtype=network.dtype,
        channels_last=network.asked_channels_last,
        guidance_scale=settings.guidance_scale,
        guidance_rescale=settings.guidance_rescale,
        guide=None if sampler.guide is None else sampler.guide.model,
        guidance_interval=settings.guidance_interval,
        dynamic_threshold=settings.dynamic_threshold,
        denoised_fn=sampler.denoised_fn,
        self_condition=sampler.self_condition,
        device=sampler.device,
    )
    return upward.sample(image.shape, noise=image, model_kwargs=model_kwargs)


def through_noise(
    sampler: Sampler,
    images: Tensor,
    steps: int,
    *,
    seed: int = 0,
    number: int = 0,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """``images`` (N, C, ...) in [−1, 1], noised to x_t by ``steps`` of the sampler's steps and led
    back by it, all with the same draws, which the sampler makes for its sample ``number`` of
    ``seed``.

    0 steps leave them as they are; all of them leave next to nothing of them. Raises InputError for
    steps out of range, and as ``Sampler.sample``.
    """
    every = len(noise_levels(sampler.diffusion)[0])
    if not 0 <= steps <= every:
        raise InputError(f"steps is {steps}; expected 0 … {every}, the steps that are sampled by")
    if steps == 0:
        return images.float()
    rows = len(sampler.settings.table(sampler.diffusion, every - steps))

    def draw(step: int) -> Tensor:
        options: dict[str, Any] = {"seed": seed, "first_sample": number, "device": images.device}
        return normal((1, *images.shape[1:]), step=step, **options).expand(images.shape)

    return sampler.sample(
        images.shape,
        image=images,
        strength=steps / every,
        noise=draw(X_T_STEP),
        step_noise=lambda t: draw(sampling_step(rows - 1 - t)).contiguous(),
        model_kwargs=model_kwargs,
    )

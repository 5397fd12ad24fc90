"""Classifier guidance: the gradient of a classifier's log p(y | x_t), as samplers take it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checks import is_finite
from fastdiff.errors import InputError
from fastdiff.models.eval_mode import eval_mode
from fastdiff.models.wrappers import tensor_of
from fastdiff.process.classification import class_log_probability
from fastdiff.process.update import CondFn


def classifier_gradient(
    classifier: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0
) -> CondFn:
    """A ``cond_fn`` that answers scale·∇ log p(y | x_t), by autograd.

    It is what ``Sampler(cond_fn=)`` takes, and the loops of GaussianDiffusion and guided-diffusion:
    called cond_fn(x, timesteps, y) with x (N, C, ...), the network's timesteps (N,) and classes y
    (N,), it answers what x is like. Of an unconditional network y is given by ``sample``'s
    ``cond_kwargs``. What further arguments a network has are taken, and not used.

    Args:
        classifier: called classifier(x, timesteps) answers logits (N, K): an EncoderUNet, or any
            other that knows noisy samples. A module is run in eval mode.
        scale: s of Dhariwal & Nichol 2021 (arXiv:2105.05233), algorithms 1 and 2: 0 is no guidance,
            more than 1 sharpens p(y | x_t) to its power.

    Raises InputError for a scale that is not finite; when it is called, for classes that are
    missing or not the classifier's.
    """
    if not callable(classifier):
        raise InputError(
            f"classifier is a {type(classifier).__name__}; expected a module or a function"
        )
    if not is_finite(scale):
        raise InputError(f"the classifier's scale is {scale!r}; expected a finite number")
    modules = [classifier] if isinstance(classifier, nn.Module) else []

    def cond_fn(x: Tensor, timesteps: Tensor, y: Tensor | None = None, **_: Any) -> Tensor:
        with torch.enable_grad(), eval_mode(modules):
            x = x.detach().requires_grad_()
            logits = tensor_of(classifier(x, timesteps))
            (gradient,) = torch.autograd.grad(class_log_probability(logits, y).sum(), x)
        return scale * gradient

    return cond_fn

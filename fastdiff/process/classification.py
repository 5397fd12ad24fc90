"""What a classifier of noisy images is trained by: the cross entropy of p(y | x_t), x_t drawn by a
process (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checks import check_labels, first_outside
from fastdiff.errors import InputError
from fastdiff.ops.counters import Counters
from fastdiff.process.config import built
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.losses import noisy
from fastdiff.process.reverse import Model

PROCESS = "noisy_classification"


class NoisyClassification:
    """The training of a classifier on x_t ~ q(x_t | x_0), in a process's place in a trainer.

    Args:
        diffusion: the process, that of the network which the classifier shall guide. The classifier
            is given the timesteps that the network would be.

    Attributes: ``num_timesteps``, the process's; ``label``, the argument of
    :meth:`training_losses` by which a trainer gives it the classes.
    """

    continuous = False  # t of training_losses is one of the process's steps
    label = "y"

    def __init__(self, diffusion: GaussianDiffusion):
        if not isinstance(diffusion, GaussianDiffusion):
            raise InputError(
                "NoisyClassification needs a GaussianDiffusion, by which images are noised; got a "
                f"{type(diffusion).__name__}"
            )
        self.diffusion = diffusion
        self.num_timesteps = diffusion.num_timesteps

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        step: int | Tensor = 0,
        first_sample: int | Tensor = 0,
    ) -> dict[str, Tensor]:
        """{"loss", "accuracy"}, each (N,): −log p(y | x_t) in nats; whether y is the likeliest, 0
        or 1.

        ``model_kwargs`` has y, (N,) integer classes; ``model`` is called without it and answers
        logits (N, K). The other arguments, and the errors, as
        :meth:`GaussianDiffusion.training_losses`.
        """
        kwargs = dict(model_kwargs or {})
        y = kwargs.pop(self.label, None)
        counters = Counters(step, seed, first_sample)
        x_t, _, at = noisy(self.diffusion, x_start, t, noise, generator, counters)
        logits = model(x_t, at["model_timesteps"].flatten().float(), **kwargs)
        loss = -class_log_probability(logits, y)
        assert y is not None
        return {"loss": loss, "accuracy": (logits.argmax(dim=1) == y).to(loss.dtype)}

    def to_config(self) -> dict[str, Any]:
        """A JSON dictionary from which :meth:`from_config` makes an equal object."""
        return {"process": PROCESS, "diffusion": self.diffusion.to_config()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NoisyClassification":
        """What :meth:`to_config` described. Raises InputError for any other dictionary."""
        return built(_of_config, PROCESS, config)


def _of_config(diffusion: dict[str, Any]) -> NoisyClassification:
    return NoisyClassification(GaussianDiffusion.from_config(diffusion))


def class_log_probability(logits: Tensor, y: Tensor | None) -> Tensor:
    """log p(y), (N,), of logits (N, K) and integer classes y (N,).

    Raises InputError for what does not fit; for a class out of range on the CPU only: looking at
    the classes on a GPU would wait for it.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the classifier answered {came}; expected logits (N, classes)")
    n, classes = logits.shape
    if y is None:
        raise InputError(f"the classifier needs y, the samples' classes: ({n},) integers")
    check_labels(y, n, "y", "classes")
    if (stray := first_outside(y, classes)) is not None:
        raise InputError(f"y holds class {stray}; the classifier has 0 … {classes - 1}")
    return -F.cross_entropy(logits, y.long(), reduction="none")

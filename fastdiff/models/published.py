"""Weights released with improved-diffusion and guided-diffusion."""

import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.models import presets
from fastdiff.models.files import load_weights
from fastdiff.models.unet import UNet


def load_published(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    preset: str | None = None,
    **unet_kwargs: Any,
) -> UNet:
    """A U-Net with the weights of a published ``.pt`` state dict, in eval mode.

    Such a file does not say which network it belongs to: name a preset, or give the arguments of
    ``UNet``, or both (the arguments win). Attention order and number of heads leave no trace in the
    shapes, so a wrong one loads without an error and computes nonsense.

    Args:
        source: the file, or the state dict itself.
        preset: a name from ``presets``.

    Raises:
        InputError: not such a file, or weights that do not fit the network.
    """
    if isinstance(source, Mapping):
        state, name = source, "the state dict"
    else:
        state, name = _read(source), os.fspath(source)
    kwargs = {**(presets.get(preset).model if preset else {}), **unet_kwargs}
    model = UNet(**kwargs)
    load_weights(model, state, name)
    return model.eval()


def _read(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    try:
        # weights_only: a pickle from the network must not run code.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{os.fspath(path)}: there is no such file") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{os.fspath(path)} is not a PyTorch state dict ({reason})") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{os.fspath(path)} is not a state dict of tensors")
    return state

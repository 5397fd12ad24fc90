"""Do the labels and small images of a U-Net's forward fit the network? One line when not."""

from typing import Any

from torch import Tensor

from fastdiff.checks import check_labels, first_outside
from fastdiff.errors import InputError


def check_inputs(
    net: Any,
    x: Tensor,
    y: Tensor | None,
    low_res: Tensor | None,
    noise_level: Tensor | None,
) -> None:
    """InputError unless the UNet ``net`` can be given these conditions of a batch ``x``."""
    _check_labels(net, len(x), y)
    _check_low_res(net, x, low_res, noise_level)


def _check_low_res(net: Any, x: Tensor, low_res: Tensor | None, noise_level: Tensor | None) -> None:
    n = x.shape[0]
    if (low_res is not None) != net.super_res:
        raise InputError(
            "UNet: low_res is missing; a super-resolution network needs the small image"
            if net.super_res
            else "UNet: low_res was given, but the network was not built with super_res=True"
        )
    if low_res is not None and (
        low_res.dim() != x.dim() or low_res.shape[:2] != (n, net.in_channels)
    ):
        raise InputError(
            f"UNet: low_res has shape {tuple(low_res.shape)}; "
            f"expected {net.dims + 2} dimensions that start with ({n}, {net.in_channels})"
        )
    if (noise_level is not None) != net.noise_cond:
        raise InputError(
            "UNet: noise_level is missing; the network was built with noise_cond=True"
            if net.noise_cond
            else "UNet: noise_level was given, but the network was not built with noise_cond"
        )
    if noise_level is not None and noise_level.shape != (n,):
        raise InputError(f"UNet: noise_level has shape {tuple(noise_level.shape)}; expected ({n},)")


def _check_labels(net: Any, n: int, y: Tensor | None) -> None:
    if net.num_classes is None:
        if y is not None:
            raise InputError("UNet: y was given, but the network has no classes")
        return
    if y is None:
        raise InputError(f"UNet: y is missing; the network has {net.num_classes} classes")
    check_labels(y, n, "UNet: y", "labels")
    count = net.label_emb.num_embeddings
    if (stray := first_outside(y, count)) is not None:
        raise InputError(f"UNet: y holds label {stray}; expected 0 to {count - 1}")

"""The blocks of diffusers' U-Nets and autoencoders. Known by name and parts: diffusers itself is
not imported."""

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.acceleration.fused_class import Fusion, Refused, Trials
from fastdiff.acceleration.pieces import is_group_norm, is_silu, randn
from fastdiff.models.blocks import apply_norm

PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")


def fusions(module: Any) -> Iterator[tuple[Fusion, Trials]]:
    """What may fuse this module, with inputs to try it on; nothing for another kind of module."""
    if _is_resnet_block(module):
        silu, projection = is_silu(module.nonlinearity), module.time_emb_proj
        bypassed = ("norm1", "norm2", *(("nonlinearity",) if silu else ()))
        how = f"both norms with what is around them{'' if silu else ', but for the activation'}"
        options = (("activation", "silu" if silu else None),)
        temb = None if projection is None else randn(2, projection.in_features)
        yield (
            Fusion(how, _resnet_block, bypassed, options=options),
            [(randn(2, module.norm1.num_channels, 4, 4), temb)],
        )
    elif _is_attention(module):
        _check_attention(module)
        norm = module.group_norm is not None
        how = "attention without copies (PyTorch's scaled_dot_product_attention)"
        yield (
            Fusion(
                f"norm, and self-{how}" if norm else how,
                _attention,
                ("group_norm",) if norm else (),
                ignored=("temb",),  # read by a spatial_norm alone
            ),
            _attention_trials(module),
        )


def _is_resnet_block(module: Any) -> bool:
    names = ("norm1", "norm2", "nonlinearity", "time_emb_proj", "time_embedding_norm")
    if type(module).__name__ != "ResnetBlock2D" or not all(hasattr(module, n) for n in names):
        return False
    return (
        is_group_norm(module.norm1)
        and is_group_norm(module.norm2)
        and isinstance(module.nonlinearity, nn.Module)
        and (module.time_emb_proj is None or isinstance(module.time_emb_proj, nn.Linear))
    )


def _resnet_block(self: Any, x: Tensor, temb: Tensor | None, *, activation: str | None) -> Any:
    def norm(layer: nn.Module, h: Tensor, **film: Any) -> Tensor:
        h = apply_norm(layer, h, activation=activation, **film)
        return h if activation else self.nonlinearity(h)

    h = norm(self.norm1, x)
    resample = self.upsample if self.upsample is not None else self.downsample
    if resample is not None:
        x, h = resample(x), resample(h)
    h = self.conv1(h)
    if self.time_emb_proj is not None:
        temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
    if temb is None:
        h = norm(self.norm2, h)
    elif self.time_embedding_norm == "default":
        h = norm(self.norm2, h, add=temb.to(h.dtype))
    else:
        scale, shift = temb.to(h.dtype).chunk(2, dim=1)
        h = norm(self.norm2, h, scale=scale, shift=shift)
    h = self.conv2(self.dropout(h))
    if self.conv_shortcut is not None:
        x = self.conv_shortcut(x)
    h = x + h
    return h if self.output_scale_factor == 1 else h / self.output_scale_factor


def _is_attention(module: Any) -> bool:
    names = ("processor", "group_norm", "heads", "to_out", "residual_connection")
    named = type(module).__name__ == "Attention" and all(hasattr(module, n) for n in names)
    return named and isinstance(getattr(module, "to_q", None), nn.Module)


def _check_attention(module: Any) -> None:
    """Refused where something else than softmax(QKᵀ)V over the arguments is asked for."""
    processor = type(module.processor).__name__
    if processor not in PROCESSORS:
        raise Refused(f"its attention is its processor's ({processor})")
    for part in ("spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim"):
        if getattr(module, part, None) is not None:
            raise Refused(f"its attention has a {part}, which the fused one has not")
    if module.group_norm is not None and not is_group_norm(module.group_norm):
        raise Refused(f"its norm is a {type(module.group_norm).__name__}")


def _attention_trials(module: Any) -> Trials:
    """On tokens and on an image, of itself and of a context."""
    if not all(hasattr(layer, "in_features") for layer in (module.to_q, module.to_k)):
        raise Refused("its projections are no linear layers")
    width, context_width = module.to_q.in_features, module.to_k.in_features
    context = randn(2, 3, context_width)
    inputs = (randn(2, 5, width), randn(2, width, 4, 4))
    return [(x, other) for other in (None, context) for x in inputs]


def _attention(self: Any, x: Tensor, context: Tensor | None) -> Tensor:
    """x (N, T, C) tokens or (N, C, H, W), context (N, S, D)."""
    h = x if x.dim() == 4 else x.transpose(1, 2)  # (N, C, …)
    if self.group_norm is not None:
        h = apply_norm(self.group_norm, h, activation=None)
    tokens = h.flatten(2).transpose(1, 2)  # (N, T, C), a view of a channels_last image
    context = tokens if context is None else context
    query, key, value = (
        layer(given).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        for layer, given in ((self.to_q, tokens), (self.to_k, context), (self.to_v, context))
    )
    h = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    for layer in self.to_out:
        h = layer(h)
    if x.dim() == 4:
        h = h.transpose(1, 2).view_as(x)
    if self.residual_connection:
        h = h + x
    return h if self.rescale_output_factor == 1 else h / self.rescale_output_factor

"""The blocks of diffusers' U-Nets and autoencoders. Known by name and parts: diffusers itself is
not imported."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.acceleration.fused_class import Fusion
from fastdiff.acceleration.pieces import is_group_norm, is_silu
from fastdiff.models.blocks import apply_norm

# What the published attention may be asked for beside plain self-attention over an image.
UNUSED_PARTS = ("spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")


def fusions(module: Any) -> Iterator[tuple[Fusion, tuple[Any, ...]]]:
    """What may fuse this module, with inputs to try it on; nothing for another kind of module."""
    if _is_resnet_block(module):
        projection = module.time_emb_proj
        temb = None if projection is None else torch.randn(2, projection.in_features)
        yield (
            Fusion(
                "both norms with what is around them",
                _resnet_block,
                ("norm1", "norm2", "nonlinearity"),
                ("time_embedding_norm", "skip_time_act"),
            ),
            (torch.randn(2, module.norm1.num_channels, 4, 4), temb),
        )
    elif _is_attention(module):
        yield (
            Fusion(
                "norm, and self-attention without copies (PyTorch's scaled_dot_product_attention)",
                _attention,
                ("group_norm",),
                ("heads", *UNUSED_PARTS),
            ),
            (torch.randn(2, module.group_norm.num_channels, 4, 4),),
        )


def _is_resnet_block(module: Any) -> bool:
    names = ("norm1", "norm2", "nonlinearity", "time_emb_proj", "time_embedding_norm")
    if type(module).__name__ != "ResnetBlock2D" or not all(hasattr(module, n) for n in names):
        return False
    return (
        is_group_norm(module.norm1)
        and is_group_norm(module.norm2)
        and is_silu(module.nonlinearity)
        and (module.time_emb_proj is None or isinstance(module.time_emb_proj, nn.Linear))
        and (
            module.time_embedding_norm == "default"
            or (module.time_embedding_norm == "scale_shift" and module.time_emb_proj is not None)
        )
    )


def _resnet_block(self: Any, input_tensor: Tensor, temb: Tensor | None, *_: Any, **__: Any) -> Any:
    x, h = input_tensor, apply_norm(self.norm1, input_tensor)
    resample = self.upsample if self.upsample is not None else self.downsample
    if resample is not None:
        x, h = resample(x), resample(h)
    h = self.conv1(h)
    if self.time_emb_proj is not None:
        temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
    if temb is None:
        h = apply_norm(self.norm2, h)
    elif self.time_embedding_norm == "default":
        h = apply_norm(self.norm2, h, add=temb.to(h.dtype))
    else:
        scale, shift = temb.to(h.dtype).chunk(2, dim=1)
        h = apply_norm(self.norm2, h, scale=scale, shift=shift)
    h = self.conv2(self.dropout(h))
    if self.conv_shortcut is not None:
        x = self.conv_shortcut(x)
    h = x + h
    return h if self.output_scale_factor == 1 else h / self.output_scale_factor


def _is_attention(module: Any) -> bool:
    return (
        type(module).__name__ == "Attention"
        and is_group_norm(getattr(module, "group_norm", None))
        and hasattr(module, "processor")
        and _is_plain(module)
    )


def _is_plain(module: Any) -> bool:
    """Whether nothing but self-attention by the default processor is asked for."""
    extras = (getattr(module, name, None) for name in UNUSED_PARTS)
    return type(module.processor).__name__ == "AttnProcessor2_0" and not any(extras)


def _attention(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    others = encoder_hidden_states is not None or attention_mask is not None
    if others or hidden_states.dim() != 4 or not _is_plain(self):
        return self.fastdiff_original.forward(
            self, hidden_states, encoder_hidden_states, attention_mask, **options
        )
    x = hidden_states
    h = apply_norm(self.group_norm, x, activation=None)
    tokens = h.flatten(2).transpose(1, 2)  # (N, T, C), a view of a channels_last image
    query, key, value = (
        layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        for layer in (self.to_q, self.to_k, self.to_v)
    )
    h = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    for layer in self.to_out:
        h = layer(h)
    h = h.transpose(1, 2).view_as(x)
    if self.residual_connection:
        h = h + x
    return h if self.rescale_output_factor == 1 else h / self.rescale_output_factor

"""The blocks of improved-diffusion, guided-diffusion and GLIDE, and of the many copies of their
U-Net."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fastdiff.acceleration.fused_class import Fusion, Trials
from fastdiff.acceleration.pieces import holds_group_norm, is_group_norm, randn
from fastdiff.models.blocks import apply_norm, pointwise
from fastdiff.ops.attention.op import attention


def fusions(module: Any) -> Iterator[tuple[Fusion, Trials]]:
    """What may fuse this module, with inputs to try it on; nothing for another kind of module."""
    if _is_res_block(module):
        norm, *_, convolution = module.in_layers
        linear = next(layer for layer in module.emb_layers if isinstance(layer, nn.Linear))
        shape = (2, norm.num_channels, *[4] * (convolution.weight.dim() - 2))
        parts = ("in_layers", "out_layers")
        bypassed = (*parts, *(f"{part}.{i}" for part in parts for i in (0, 1)))
        how = "both norms with what is around them"
        yield (
            Fusion(how, _res_block, bypassed, _method(module)),
            [(randn(shape), randn(2, linear.in_features))],
        )
    elif _is_attention_block(module):
        heads = getattr(module, "num_heads", None) or getattr(module.attention, "n_heads", None)
        channels = module.norm.num_channels
        for order in ("heads_first", "qkv_first"):
            yield (
                Fusion(
                    f"norm and attention ({order})",
                    _attention_block,
                    ("norm", "attention"),
                    _method(module),
                    (("order", order), ("num_heads", heads)),
                ),
                [(randn(2, channels, *[4] * dims),) for dims in (1, 2, 3)],
            )


def _method(module: nn.Module) -> str:
    return "_forward" if hasattr(module, "_forward") else "forward"


def _is_res_block(module: Any) -> bool:
    """Of a norm with an activation, whether its own or the next layer, perhaps more, and a
    convolution."""
    names = ("in_layers", "emb_layers", "out_layers")
    parts: list[Any] = [getattr(module, name, None) for name in names]
    if not all(type(part) is nn.Sequential for part in parts):
        return False
    first, embedding, last = parts
    return (
        all(len(part) > 2 and holds_group_norm(part[0]) for part in (first, last))
        and isinstance(getattr(first[-1], "weight", None), Tensor)
        and any(isinstance(layer, nn.Linear) for layer in embedding)
        and isinstance(getattr(module, "skip_connection", None), nn.Module)
    )


def _res_block(self: Any, x: Tensor, emb: Tensor) -> Tensor:
    in_norm, _, *in_rest, in_conv = self.in_layers
    out_norm, _, *out_rest = self.out_layers
    h = apply_norm(in_norm, x)
    for layer in in_rest:
        h = layer(h)
    if getattr(self, "updown", False):
        h, x = self.h_upd(h), self.x_upd(x)
    h = in_conv(h)
    emb = self.emb_layers(emb).to(h.dtype)
    if getattr(self, "use_scale_shift_norm", False):
        scale, shift = emb.chunk(2, dim=1)
        h = apply_norm(out_norm, h, scale=scale, shift=shift)
    else:
        h = apply_norm(out_norm, h, add=emb)
    for layer in out_rest:
        h = layer(h)
    return self.skip_connection(x) + h


def _is_attention_block(module: Any) -> bool:
    parts: list[Any] = [getattr(module, name, None) for name in ("norm", "qkv", "proj_out")]
    norm, qkv, out = parts
    return (
        is_group_norm(norm)
        and type(qkv) is nn.Conv1d
        and type(out) is nn.Conv1d
        and qkv.kernel_size == out.kernel_size == (1,)
        and qkv.out_channels == 3 * norm.num_channels
        and isinstance(getattr(module, "attention", None), nn.Module)
    )


def _attention_block(self: Any, x: Tensor, *, order: str, num_heads: int) -> Tensor:
    h = apply_norm(self.norm, x, activation=None)
    tokens = h.flatten(2).transpose(1, 2)  # (N, T, C), a view of a channels_last image
    qkv = _project(self.qkv, tokens)
    h = attention(qkv.transpose(1, 2), num_heads, order=order)
    h = _project(self.proj_out, h.transpose(1, 2))
    return x + h.transpose(1, 2).view_as(x)


def _project(layer: nn.Module, tokens: Tensor) -> Tensor:
    """A 1×1 convolution over (N, T, C) tokens; as a layer, where it is no plain one any more."""
    if type(layer) is nn.Conv1d and not layer._forward_hooks and not layer._forward_pre_hooks:
        return pointwise(layer, tokens)
    return layer(tokens.transpose(1, 2)).transpose(1, 2)

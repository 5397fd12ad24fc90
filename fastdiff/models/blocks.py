"""The blocks of the published U-Nets. Submodule names are the published state_dict keys.

Each GroupNorm with the FiLM and SiLU around it is one call of ``ops.group_norm_silu``, and the
attention on a qkv projection one call of ``ops.attention``: the modules in ``in_layers`` and the
like hold parameters under their published names, and ``forward`` reads those instead of calling
them.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdiff.errors import InputError
from fastdiff.models.convolve import convolve
from fastdiff.models.execution.program import Program, Value
from fastdiff.models.resampling import Downsample, Upsample, convolution, upsample_nearest
from fastdiff.ops.attention.op import attention
from fastdiff.ops.group_norm_silu.op import group_norm_silu

NORM_GROUPS = 32
Norm = Callable[[int], nn.GroupNorm]


def timestep_embedding(
    timesteps: Tensor,
    dim: int,
    max_period: float = 10000.0,
    *,
    flip_sin_to_cos: bool = True,
    freq_shift: float = 0,
) -> Tensor:
    """Sinusoidal embedding of (possibly fractional) timesteps.

    Args:
        timesteps: (N,), any real dtype.
        dim: width of the embedding; an odd one ends in a zero.
        flip_sin_to_cos: [cos, sin] instead of [sin, cos].
        freq_shift: what the divisor of the exponents is less than dim // 2.

    Returns:
        (N, dim) float32, on the device of ``timesteps`` and computed there.

    Source: Vaswani et al. 2017, section 3.5, by default with the order and the divisor (dim // 2)
    of improved-diffusion; Ho et al. use [sin, cos] and dim // 2 − 1.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(max_period) * exponent / (half - freq_shift or 1))
    angles = timesteps.float()[:, None] * frequencies  # (N, half)
    waves = [angles.cos(), angles.sin()]
    embedding = torch.cat(waves if flip_sin_to_cos else waves[::-1], dim=1)
    return F.pad(embedding, (0, dim % 2)) if dim % 2 else embedding


def normalization(channels: int, groups: int = NORM_GROUPS, eps: float = 1e-5) -> nn.GroupNorm:
    """The published norm: 32 groups, or as many of 32 as divide the channels."""
    return nn.GroupNorm(math.gcd(groups, channels), channels, eps)


def zero_module(module: nn.Module) -> nn.Module:
    """Start a block's last layer at zero, so that the block starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def apply_norm(
    norm: nn.Module,
    x: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """One fused norm with the parameters that ``norm`` holds."""
    assert isinstance(norm, nn.GroupNorm)
    return group_norm_silu(
        x,
        norm.num_groups,
        norm.weight,
        norm.bias,
        norm.eps,
        scale=scale,
        shift=shift,
        add=add,
        activation=activation,
    )


def run_checkpointed(function: Callable[..., Tensor], enabled: bool, *args: Tensor) -> Tensor:
    """Call ``function``; if ``enabled``, keep only its inputs and compute it again in backward."""
    if enabled and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)


class ResBlock(nn.Module):
    """Residual block conditioned on an embedding, optionally resampling by 2.

    Args:
        channels, out_channels: of input and output.
        emb_channels: width of the embedding.
        dropout: rate before the last convolution.
        use_scale_shift_norm: FiLM (scale and shift after the second norm) instead of adding the
            projected embedding before it.
        resample: ``"up"``, ``"down"`` or None.
        norm: makes the norm of so many channels.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int,
        *,
        dims: int,
        use_scale_shift_norm: bool,
        use_checkpoint: bool,
        resample: str | None = None,
        norm: Norm = normalization,
    ):
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.resample = resample
        self.in_layers = nn.Sequential(
            norm(channels), nn.SiLU(), convolution(dims, channels, out_channels, 3)
        )
        self.pool = Downsample(channels, False, dims) if resample == "down" else None
        emb_width = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_width))
        self.out_layers = nn.Sequential(
            norm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(convolution(dims, out_channels, out_channels, 3)),
        )
        self.skip_connection: nn.Module = (
            nn.Identity()
            if channels == out_channels
            else convolution(dims, channels, out_channels, 1)
        )

    def forward(self, x: Tensor, emb: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """x (N, C, *spatial), SiLU of the embedding (N, E) -> (N, C', *spatial').

        ``size`` is where "up" goes.
        """
        return run_checkpointed(
            lambda x, emb: self._forward(x, emb, size), self.use_checkpoint, x, emb
        )

    def _forward(self, x: Tensor, emb: Tensor, size: Sequence[int] | None) -> Tensor:
        in_norm, _, in_conv = self.in_layers
        out_norm, _, dropout, out_conv = self.out_layers
        h = apply_norm(in_norm, x)
        if self.resample == "up":
            assert size is not None
            h, x = upsample_nearest(h, size), upsample_nearest(x, size)
        elif self.pool is not None:
            h, x = self.pool(h), self.pool(x)
        h = convolve(in_conv, h)
        _, emb_linear = self.emb_layers  # whose SiLU all blocks share
        emb = emb_linear(emb)  # (N, C') or (N, 2C')
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = apply_norm(out_norm, h, scale=scale, shift=shift)
        else:
            h = apply_norm(out_norm, h, add=emb)
        h = convolve(out_conv, dropout(h))
        # In place: nothing needs the convolution's output again.
        h += convolve(self.skip_connection, x)
        return h

    def unroll(
        self, program: Program, x: Value, emb: Value, size: Sequence[int] | None = None
    ) -> Value:
        in_norm, _, in_conv = self.in_layers
        out_norm, _, _, out_conv = self.out_layers
        h = program.norm(in_norm, x)
        if self.resample == "up":
            assert size is not None
            h, x = program.upsample(self, h, size), program.upsample(self, x, size)
        elif self.pool is not None:
            h, x = self.pool.unroll(program, h), self.pool.unroll(program, x)
        _, emb_linear = self.emb_layers
        emb = program.projection(emb_linear, emb)
        if self.use_scale_shift_norm:
            h = program.norm(out_norm, program.convolution(in_conv, h), film=emb)
        else:
            h = program.norm(out_norm, program.convolution(in_conv, h, add=emb))
        if not isinstance(self.skip_connection, nn.Identity):
            x = program.convolution(self.skip_connection, x)
        return program.convolution(out_conv, h, residual=x)


class AttentionBlock(nn.Module):
    """Self-attention over all positions, added to its input."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        order: str,
        use_checkpoint: bool,
        norm: Norm = normalization,
    ):
        super().__init__()
        if channels % num_heads:
            raise InputError(
                f"attention over {channels} channels cannot have {num_heads} heads; "
                "the number of heads must divide the channels"
            )
        self.num_heads = num_heads
        self.order = order
        self.use_checkpoint = use_checkpoint
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, *spatial) -> the same shape."""
        return run_checkpointed(self._forward, self.use_checkpoint, x)

    def _forward(self, x: Tensor) -> Tensor:
        h = apply_norm(self.norm, x, activation=None)
        # Tokens before channels, (N, T, C): a view of a channels_last image, a copy of another.
        # Both projections are then matrix products, and attention reads rows of q, k and v.
        tokens = h.flatten(2).transpose(1, 2)
        qkv = pointwise(self.qkv, tokens)  # (N, T, 3C)
        h = attention(qkv.transpose(1, 2), self.num_heads, order=self.order)  # (N, C, T)
        h = pointwise(self.proj_out, h.transpose(1, 2))  # (N, T, C)
        return x + h.transpose(1, 2).view_as(x)

    def unroll(self, program: Program, x: Value) -> Value:
        h = program.norm(self.norm, x, activation=None)
        h = program.convolution(self.qkv, h)
        h = program.attention(self, h, self.num_heads, self.order)
        return program.convolution(self.proj_out, h, residual=x)


def pointwise(layer: nn.Module, tokens: Tensor) -> Tensor:
    """A 1×1 convolution applied to tokens (..., C)."""
    assert isinstance(layer, nn.Conv1d)
    return F.linear(tokens, layer.weight[:, :, 0], layer.bias)


class EmbedSequential(nn.Sequential):
    """Layers in a row; passes the embedding and the target size to those that take them."""

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, size: Sequence[int] | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb, size)
            elif isinstance(layer, Upsample):
                assert size is not None
                x = layer(x, size)
            else:
                x = convolve(layer, x)
        return x

    def unroll(
        self, program: Program, x: Value, emb: Value, size: Sequence[int] | None = None
    ) -> Value:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer.unroll(program, x, emb, size)
            elif isinstance(layer, Upsample):
                assert size is not None
                x = layer.unroll(program, x, size)
            elif isinstance(layer, AttentionBlock | Downsample):
                x = layer.unroll(program, x)
            else:
                x = program.convolution(layer, x)
        return x


class AttentionPool(nn.Module):
    """What attention over all positions and their mean gives the mean, projected.

    Args:
        positions: of the images that come; each has an embedding of its own.
        channels, out_channels: of input and output.

    Source: Radford et al. 2021 (CLIP), section 2.4; guided-diffusion.
    """

    def __init__(self, positions: int, channels: int, num_heads: int, out_channels: int):
        super().__init__()
        self.positional_embedding = nn.Parameter(
            torch.randn(channels, positions + 1) / channels**0.5
        )
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, *spatial) -> (N, C')."""
        tokens = x.flatten(2)  # (N, C, T)
        tokens = torch.cat([tokens.mean(dim=2, keepdim=True), tokens], dim=2)
        tokens = tokens + self.positional_embedding
        qkv = pointwise(self.qkv_proj, tokens.transpose(1, 2))  # (N, T + 1, 3C)
        h = attention(qkv.transpose(1, 2), self.num_heads, order="qkv_first")  # (N, C, T + 1)
        return pointwise(self.c_proj, h[:, :, 0])

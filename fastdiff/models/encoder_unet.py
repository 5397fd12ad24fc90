"""The classifier of noisy images that guides a sampler: the half of a U-Net that goes down."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import InputError
from fastdiff.models.blocks import (
    AttentionPool,
    apply_norm,
    normalization,
    zero_module,
)
from fastdiff.models.encoder import Encoder
from fastdiff.models.resampling import convolution
from fastdiff.models.unet_config import check_encoder, plain

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
POOLINGS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
HIDDEN = 2048  # width between the features of the spatial pools and the logits


class EncoderUNet(Encoder):
    """Half a U-Net whose answer are the logits of p(y | x_t), one for each class.

    The arguments are those of the published ``EncoderUNetModel``, and the state_dict has its keys,
    so a published classifier loads with ``strict=True``.

    Args:
        image_size: H and W, or one number for both; attention pooling takes no other size.
        in_channels: channels C of ``x``.
        model_channels: base width; every level is a multiple of it.
        out_channels: how many classes there are.
        num_res_blocks: residual blocks per level.
        attention_resolutions: the downsampling factors (1, 2, 4, ...) at which attention follows
            each residual block.
        dropout: rate inside the residual blocks.
        channel_mult: width of each level over ``model_channels``; between levels the size halves.
        conv_resample: resample with a convolution (True) or by pooling (False).
        dims: 1, 2 or 3 spatial dimensions.
        use_checkpoint: recompute activations in backward, for memory.
        num_heads: attention heads.
        num_head_channels: width of a head; overrides ``num_heads`` unless −1.
        num_heads_upsample: the published constructor has it too; there is no way up here.
        use_scale_shift_norm: FiLM instead of adding the embedding.
        resblock_updown: resample inside residual blocks.
        use_new_attention_order: as UNet's.
        pool: what makes one vector of the last features: ``"adaptive"``, their mean;
            ``"attention"``, attention; ``"spatial"`` and ``"spatial_v2"`` take the means of every
            block's, through a hidden layer (without and with a norm).

    Attributes: ``num_classes``, that is out_channels; ``sides``, (H, W) of its images.

    Raises:
        InputError: arguments that do not fit together.

    Source: Dhariwal & Nichol 2021, section 4 and appendix H (guided-diffusion).
    """

    kind = "EncoderUNet"

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        *,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ):
        arguments: dict[str, Any] = {
            "image_size": image_size,
            "in_channels": in_channels,
            "model_channels": model_channels,
            "out_channels": out_channels,
            "num_res_blocks": num_res_blocks,
            "attention_resolutions": attention_resolutions,
            "dropout": dropout,
            "channel_mult": channel_mult,
            "conv_resample": conv_resample,
            "dims": dims,
            "use_checkpoint": use_checkpoint,
            "num_heads": num_heads,
            "num_head_channels": num_head_channels,
            "num_heads_upsample": num_heads_upsample,
            "use_scale_shift_norm": use_scale_shift_norm,
            "resblock_updown": resblock_updown,
            "use_new_attention_order": use_new_attention_order,
            "pool": pool,
        }
        config = plain(arguments)
        check_encoder(config, self.kind)
        _check_pool(config)
        super().__init__(config)
        self.num_classes = out_channels
        self.image_size = image_size
        self.pool = pool
        self._build_embedding()
        answered = self._build_way_down(in_channels)
        self.out = self._output(answered)
        self._lay_out()

    def _output(self, answered: Sequence[int]) -> nn.Sequential:
        """The layers from the features to the logits; ``answered``: each input block's channels."""
        ch, classes = answered[-1], self.out_channels
        if self.pool == "adaptive":
            last = zero_module(convolution(self.dims, ch, classes, 1))
            return nn.Sequential(
                self._norm(ch), nn.SiLU(), POOLINGS[self.dims](1), last, nn.Flatten()
            )
        if self.pool == "attention":
            positions = math.prod(self._sides_of_the_middle())
            heads = self._heads(ch, self.config["num_heads"])
            attention = AttentionPool(positions, ch, heads, classes)
            return nn.Sequential(self._norm(ch), nn.SiLU(), attention)
        features = nn.Linear(sum(answered) + ch, HIDDEN)
        last = nn.Linear(HIDDEN, classes)
        if self.pool == "spatial":
            return nn.Sequential(features, nn.ReLU(), last)
        return nn.Sequential(features, normalization(HIDDEN), nn.SiLU(), last)

    @property
    def sides(self) -> tuple[int, int]:
        """(H, W) of the images."""
        size = self.config["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return height, width

    def _sides_of_the_middle(self) -> list[int]:
        shrunk = 2 ** (len(self.widths) - 1)
        return [-(-side // shrunk) for side in self.sides]

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """The logits of each noisy sample.

        Args:
            x: (N, in_channels, *spatial).
            timesteps: (N,), possibly fractional.

        Returns:
            (N, out_channels) in the dtype of ``x``.

        Raises:
            InputError: an argument of the wrong shape or dtype.
        """
        self._check_noisy(x, timesteps)
        if self.pool == "attention" and tuple(x.shape[2:]) != self.sides:
            height, width = self.sides
            raise InputError(
                f"EncoderUNet: x has shape {tuple(x.shape)}; its attention pooling is for images "
                f"of {height}x{width} (image_size)"
            )
        *before, h = self._encode(x.to(self._dtype()), self._embed(timesteps))
        if self.pool in ("adaptive", "attention"):
            h = apply_norm(self.out[0], h)
            logits = self.out[2:](h)
        else:
            logits = self.out(torch.cat([part.flatten(2).mean(2) for part in [*before, h]], dim=1))
        return logits.to(x.dtype)


def _check_pool(config: dict[str, Any]) -> None:
    """InputError for a pool that there is not, or that does not fit the other arguments."""
    pool, size = config["pool"], config["image_size"]
    if pool not in POOLS:
        raise InputError(f"EncoderUNet: pool={pool!r}; expected one of {', '.join(POOLS)}")
    sides = [size, size] if isinstance(size, int) else size
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise InputError(
            f"EncoderUNet: image_size={size!r}; expected the images' height and width, or one "
            "number for both"
        )
    if pool == "attention" and config["dims"] != 2:
        raise InputError(
            f"EncoderUNet: attention pooling is for images, dims=2, not for dims={config['dims']}"
        )

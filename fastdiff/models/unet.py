"""The U-Net of Improved DDPM and ADM: one class for both published constructors."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.blocks import (
    NORM_GROUPS,
    EmbedSequential,
    apply_norm,
    zero_module,
)
from fastdiff.models.convolve import convolve
from fastdiff.models.encoder import Encoder
from fastdiff.models.execution.program import Program, Value, Weight
from fastdiff.models.resampling import Upsample, convolution
from fastdiff.models.unet_config import check_config, plain
from fastdiff.models.unet_inputs import check_inputs

LEVEL_TIMESTEPS = 1000  # noise_level 1, as it is embedded
LOW_RES_MODE = {1: "linear", 2: "bilinear", 3: "trilinear"}


class UNet(Encoder):
    """U-Net that predicts the noise (and, with twice the output channels, the variance).

    The arguments are those of the published constructors, and the state_dict has their keys, so a
    published checkpoint loads with ``strict=True``.

    Args:
        in_channels: channels C of ``x``.
        model_channels: base width; every level is a multiple of it.
        out_channels: channels of the result; 2·C for a learned variance.
        num_res_blocks: residual blocks per level.
        attention_resolutions: the downsampling factors (1, 2, 4, ...) at which attention follows
            each residual block.
        dropout: rate inside the residual blocks.
        channel_mult: width of each level over ``model_channels``; between levels the size halves.
        conv_resample: resample with a convolution (True) or by pooling and repetition (False).
        dims: 1, 2 or 3 spatial dimensions. In 3-D the first one is never resampled.
        num_classes: makes the network class-conditional: it then needs ``y``.
        use_checkpoint: recompute activations in backward, for memory.
        num_heads: attention heads.
        num_head_channels: width of a head; overrides ``num_heads`` unless −1.
        num_heads_upsample: heads on the way up; −1 for ``num_heads``.
        use_scale_shift_norm: FiLM instead of adding the embedding.
        resblock_updown: resample inside residual blocks.
        use_new_attention_order: qkv rows are [Q | K | V] instead of interleaved per head. A wrong
            choice loads a published checkpoint without an error and computes nonsense.
        image_size: information only: the network takes any size.
        super_res: the network takes ``low_res`` too, resized to ``x`` and concatenated to it.
        noise_cond: of ``super_res``: it is given the ``noise_level`` of ``low_res`` as well (Ho et
            al. 2022, arXiv:2106.15282).
        null_class: one more label, ``null_label == num_classes``, that means "no class", for
            classifier-free guidance.
        norm_num_groups: groups of every norm, or as many of them as divide its channels.
        norm_eps: epsilon of every norm.
        flip_sin_to_cos: timestep embedding [cos, sin] instead of [sin, cos].
        freq_shift: what the divisor in its exponents is less than half its width.
        downsample_padding: 1 to pad the strided convolutions on every side, 0 only after the image.

    The last five are diffusers' names. Ho et al.'s own networks have ``norm_eps=1e-6``,
    ``flip_sin_to_cos=False``, ``freq_shift=1`` and ``downsample_padding=0``.

    2-D networks keep their weights in channels_last, which the CPU's and the GPU's convolutions
    prefer, and compute in it whatever the layout of ``x``.

    Raises:
        InputError: arguments that do not fit together.

    Source: Nichol & Dhariwal 2021 (improved-diffusion); Dhariwal & Nichol 2021 (guided-diffusion).
    """

    kind = "UNet"

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        *,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        image_size: int | Sequence[int] | None = None,
        super_res: bool = False,
        noise_cond: bool = False,
        null_class: bool = False,
        norm_num_groups: int = NORM_GROUPS,
        norm_eps: float = 1e-5,
        flip_sin_to_cos: bool = True,
        freq_shift: float = 0,
        downsample_padding: int = 1,
    ):
        arguments: dict[str, Any] = {
            "in_channels": in_channels,
            "model_channels": model_channels,
            "out_channels": out_channels,
            "num_res_blocks": num_res_blocks,
            "attention_resolutions": attention_resolutions,
            "dropout": dropout,
            "channel_mult": channel_mult,
            "conv_resample": conv_resample,
            "dims": dims,
            "num_classes": num_classes,
            "use_checkpoint": use_checkpoint,
            "num_heads": num_heads,
            "num_head_channels": num_head_channels,
            "num_heads_upsample": num_heads_upsample,
            "use_scale_shift_norm": use_scale_shift_norm,
            "resblock_updown": resblock_updown,
            "use_new_attention_order": use_new_attention_order,
            "image_size": image_size,
            "super_res": super_res,
            "noise_cond": noise_cond,
            "null_class": null_class,
            "norm_num_groups": norm_num_groups,
            "norm_eps": norm_eps,
            "flip_sin_to_cos": flip_sin_to_cos,
            "freq_shift": freq_shift,
            "downsample_padding": downsample_padding,
        }
        config = plain(arguments)
        check_config(config)
        super().__init__(config)
        self.num_classes = num_classes
        self.null_label = num_classes if null_class else None
        self.image_size = image_size
        self.super_res = super_res
        self.noise_cond = noise_cond
        self._build()
        self._lay_out()

    def _build(self) -> None:
        config = self.config
        self._build_embedding()
        if self.noise_cond:
            self.noise_embed = self._embedding()
        if self.num_classes is not None:
            labels = self.num_classes + (self.null_label is not None)
            self.label_emb = nn.Embedding(labels, self.emb_channels)
        skip_channels = self._build_way_down(self.in_channels * (1 + self.super_res))

        attention_at = set(config["attention_resolutions"])
        heads = config["num_heads_upsample"]
        heads = config["num_heads"] if heads == -1 else heads
        ch = skip_channels[-1]
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(self.widths))):
            for i in range(config["num_res_blocks"] + 1):
                layers: list[nn.Module] = [self._res_block(ch + skip_channels.pop(), width)]
                ch = width
                if 2**level in attention_at:
                    layers.append(self._attention(ch, heads))
                if level and i == config["num_res_blocks"]:
                    layers.append(self._upsample(ch))
                self.output_blocks.append(EmbedSequential(*layers))

        self.out = nn.Sequential(
            self._norm(ch),
            nn.SiLU(),
            zero_module(convolution(self.dims, ch, self.out_channels, 3)),
        )

    def _upsample(self, channels: int) -> nn.Module:
        if self.config["resblock_updown"]:
            return self._res_block(channels, channels, "up")
        return Upsample(channels, self.config["conv_resample"], self.dims)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        low_res: Tensor | None = None,
        noise_level: Tensor | None = None,
    ) -> Tensor:
        """The prediction for noisy samples.

        Args:
            x: (N, in_channels, *spatial).
            timesteps: (N,), possibly fractional.
            y: (N,) integer labels, given exactly when the network has classes.
            low_res: (N, in_channels, *smaller), given exactly when the network is ``super_res``.
            noise_level: (N,) in [0, 1], that of ``low_res`` (``fastdiff.process.low_res``), given
                exactly when the network has ``noise_cond``.

        Returns:
            (N, out_channels, *spatial) in the dtype of ``x``.

        Raises:
            InputError: an argument that is missing, unexpected or of the wrong shape. Labels out of
                range are found here on the CPU only: looking at them on a GPU would wait for it.
        """
        output, _ = self.forward_cut(x, timesteps, y, low_res, noise_level)
        return output

    def forward_cut(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        low_res: Tensor | None = None,
        noise_level: Tensor | None = None,
        *,
        depth: int = 0,
        deep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The prediction, and the value at which a network is cut in two.

        Args:
            depth: how many blocks at either end are shallow: the first of the input blocks, and the
                last of the output blocks. Between them lies what changes little from one timestep
                to the next (Ma et al. 2023, arXiv:2312.00858).
            deep: what another call answered beside its prediction, in place of all that is not
                shallow, which is then not computed.

        Returns:
            As ``forward``; and what the first of the shallow output blocks was given before its
            skip, (N, C', *spatial').
        """
        self.check(x, timesteps, y, low_res, noise_level)
        conditions = []
        if noise_level is not None:
            conditions.append(self.noise_embed(self._waves(LEVEL_TIMESTEPS * noise_level)))
        if y is not None:
            conditions.append(self.label_emb(y.long()))
        emb = self._embed(timesteps, *conditions)

        h = x.to(self._dtype())
        if low_res is not None:
            resized = F.interpolate(low_res.to(h.dtype), x.shape[2:], mode=LOW_RES_MODE[self.dims])
            h = torch.cat([h, resized], dim=1)
        if deep is None:
            *skips, h = self._encode(h, emb)
            deep = self._ascend(h, skips, emb, depth)
        else:
            skips = self._descend(h, emb, depth)
        h = self._ascend(deep, skips, emb, 0)
        return convolve(self.out[2], apply_norm(self.out[0], h)).to(x.dtype), deep

    def _ascend(self, h: Tensor, skips: list[Tensor], emb: Tensor, left: int) -> Tensor:
        """What the output blocks make of h, until so many skips are left."""
        while len(skips) > left:
            block = self.output_blocks[-len(skips)]
            h = torch.cat([h, skips.pop()], dim=1)
            # Upsampling goes to the next skip's size: twice this one, or one off if that was odd.
            h = block(h, emb, skips[-1].shape[2:] if skips else None)
        return h

    def check(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None,
        low_res: Tensor | None,
        noise_level: Tensor | None,
    ) -> None:
        """InputError for arguments that do not fit the network."""
        self._check_noisy(x, timesteps)
        check_inputs(self, x, y, low_res, noise_level)

    def unroll(
        self,
        program: Program,
        x: Value,
        timesteps: Value,
        y: Value | None,
        low_res: Value | None,
        noise_level: Value | None,
        *,
        depth: int = 0,
    ) -> tuple[Value, Value]:
        """As ``forward_cut`` of a whole network."""
        conditions = []
        if noise_level is not None:
            given = (self.noise_embed, noise_level, LEVEL_TIMESTEPS)
            conditions.append(self._unroll_embedding(program, *given))
        if y is not None:
            conditions.append(self._unroll_labels(program, y))
        emb = self._unroll_embed(program, timesteps, *conditions)
        if low_res is not None:
            x = program.concat(x, self._unroll_low_res(program, low_res, x.size))
        *skips, h = self._unroll_encode(program, x, emb)
        deep = self._unroll_ascend(program, h, skips, emb, depth)
        h = self._unroll_ascend(program, deep, skips, emb, 0)
        return program.convolution(self.out[2], program.norm(self.out[0], h)), deep

    def _unroll_ascend(
        self, program: Program, h: Value, skips: list[Value], emb: Value, left: int
    ) -> Value:
        while len(skips) > left:
            block = self.output_blocks[-len(skips)]
            assert isinstance(block, EmbedSequential)
            h = program.concat(h, skips.pop())
            h = block.unroll(program, h, emb, skips[-1].size if skips else None)
        return h

    def _unroll_labels(self, program: Program, y: Value) -> Value:
        def lookup(y: Tensor, weight: Tensor) -> Tensor:
            return F.embedding(y.long(), weight)

        weights = [Weight((self.label_emb,), "weight", "vector")]
        shape = (y.shape[0], self.emb_channels)
        return program.plain("lookup", lookup, y, shape=shape, weights=weights)

    def _unroll_low_res(self, program: Program, low_res: Value, size: Sequence[int]) -> Value:
        def resize(low_res: Tensor) -> Tensor:
            return F.interpolate(low_res, size, mode=LOW_RES_MODE[self.dims])

        shape = (*low_res.shape[:2], *size)
        return program.plain("resize", resize, low_res, shape=shape)

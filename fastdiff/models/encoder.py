"""The half of a U-Net that goes down: what UNet and EncoderUNet, a classifier, have in common."""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.errors import InputError
from fastdiff.models.blocks import (
    NORM_GROUPS,
    AttentionBlock,
    EmbedSequential,
    ResBlock,
    normalization,
    timestep_embedding,
)
from fastdiff.models.execution.program import Program, Value
from fastdiff.models.resampling import Downsample, convolution

# improved-diffusion's constants, of which UNet makes arguments.
CONSTANTS: dict[str, Any] = {
    "norm_num_groups": NORM_GROUPS,
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
}


class Encoder(nn.Module):
    """The embedding of the time, the way down and the middle; of a subclass, which builds them.

    ``config``: the subclass's arguments, checked. ``kind``: what messages and presets call it.
    """

    kind: str
    image_size: int | Sequence[int] | None  # of the images that it is for, H and W or both
    num_classes: int | None

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        self._settings = {**CONSTANTS, **config}
        self.in_channels: int = config["in_channels"]
        self.model_channels: int = config["model_channels"]
        self.out_channels: int = config["out_channels"]
        self.dims: int = config["dims"]

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A published configuration by name, with some arguments changed.

        Raises:
            InputError: no preset of that name, or one of another network; the message lists those
                there are.
        """
        from fastdiff.models import presets

        return cls(**{**presets.get(name, cls.kind).model, **overrides})

    def _build_embedding(self) -> None:
        self.emb_channels = 4 * self.model_channels
        self.time_embed = self._embedding()

    def _embedding(self) -> nn.Sequential:
        """Of a number's waves: layers that answer (N, emb_channels)."""
        return nn.Sequential(
            nn.Linear(self.model_channels, self.emb_channels),
            nn.SiLU(),
            nn.Linear(self.emb_channels, self.emb_channels),
        )

    def _build_way_down(self, in_channels: int) -> list[int]:
        """The input blocks and the middle; how many channels each of the former answers."""
        attention_at = set(self.config["attention_resolutions"])
        ch = self.widths[0]
        self.input_blocks = nn.ModuleList(
            [EmbedSequential(convolution(self.dims, in_channels, ch, 3))]
        )
        answered = [ch]
        for level, width in enumerate(self.widths):
            for _ in range(self.config["num_res_blocks"]):
                layers: list[nn.Module] = [self._res_block(ch, width)]
                ch = width
                if 2**level in attention_at:
                    layers.append(self._attention(ch))
                self.input_blocks.append(EmbedSequential(*layers))
                answered.append(ch)
            if level != len(self.widths) - 1:
                self.input_blocks.append(EmbedSequential(self._downsample(ch)))
                answered.append(ch)

        halvings = [m for m in self.input_blocks.modules() if getattr(m, "pad_after", None)]
        self._least_size = 2 ** len(halvings) if halvings else 0

        self.middle_block = EmbedSequential(
            self._res_block(ch, ch), self._attention(ch), self._res_block(ch, ch)
        )
        return answered

    def _lay_out(self) -> None:
        """Give the weights of a 2-D network the layout to compute in."""
        if self.dims == 2:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [int(mult * self.model_channels) for mult in self.config["channel_mult"]]

    def _norm(self, channels: int) -> nn.GroupNorm:
        settings = self._settings
        return normalization(channels, settings["norm_num_groups"], settings["norm_eps"])

    def _res_block(self, channels: int, out_channels: int, resample: str | None = None) -> ResBlock:
        return ResBlock(
            channels,
            self.emb_channels,
            self.config["dropout"],
            out_channels,
            dims=self.dims,
            use_scale_shift_norm=self.config["use_scale_shift_norm"],
            use_checkpoint=self.config["use_checkpoint"],
            resample=resample,
            norm=self._norm,
        )

    def _downsample(self, channels: int) -> nn.Module:
        if self.config["resblock_updown"]:
            return self._res_block(channels, channels, "down")
        padding = self._settings["downsample_padding"]
        return Downsample(channels, self.config["conv_resample"], self.dims, padding)

    def _heads(self, channels: int, num_heads: int) -> int:
        """How many heads attend over so many channels."""
        width = self.config["num_head_channels"]
        if width == -1:
            return num_heads
        if channels % width:
            raise InputError(
                f"num_head_channels={width} does not divide the {channels} channels of an "
                "attention block"
            )
        return channels // width

    def _attention(self, channels: int, num_heads: int | None = None) -> AttentionBlock:
        config = self.config
        return AttentionBlock(
            channels,
            self._heads(channels, config["num_heads"] if num_heads is None else num_heads),
            order="qkv_first" if config["use_new_attention_order"] else "heads_first",
            use_checkpoint=config["use_checkpoint"],
            norm=self._norm,
        )

    def _embed(self, timesteps: Tensor, *others: Tensor) -> Tensor:
        """(N, E): what the blocks are given of the time and of ``others``, embedded already."""
        emb = self.time_embed(self._waves(timesteps))
        for other in others:
            emb = emb + other
        return F.silu(emb)  # with which each block's emb_layers begin

    def _unroll_embed(self, program: Program, timesteps: Value, *others: Value) -> Value:
        emb = self._unroll_embedding(program, self.time_embed, timesteps)
        for other in others:
            emb = program.plain("add", torch.add, emb, other, shape=emb.shape, layer=emb.layer)
        return program.silu(emb)

    def _unroll_embedding(
        self, program: Program, layers: nn.Sequential, numbers: Value, times: float = 1
    ) -> Value:
        """Of (N,) numbers, multiplied by ``times``."""
        first, _, last = layers

        def waves(numbers: Tensor) -> Tensor:
            return self._waves(times * numbers, program.vectors)

        shape = (numbers.shape[0], self.model_channels)
        h = program.plain("waves", waves, numbers, shape=shape, layer=first)
        return program.linear(last, program.silu(program.linear(first, h)))

    def _waves(self, timesteps: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(N, model_channels) of (N,) numbers, by default in the dtype of the weights."""
        waves = timestep_embedding(
            timesteps,
            self.model_channels,
            flip_sin_to_cos=self._settings["flip_sin_to_cos"],
            freq_shift=self._settings["freq_shift"],
        )
        return waves.to(dtype or self._dtype())

    def _encode(self, h: Tensor, emb: Tensor) -> list[Tensor]:
        """What each of the input blocks answers, and last the middle."""
        answers = self._descend(h, emb, len(self.input_blocks))
        return [*answers, self.middle_block(answers[-1], emb)]

    def _descend(self, h: Tensor, emb: Tensor, count: int) -> list[Tensor]:
        """What each of the first ``count`` input blocks answers."""
        answers: list[Tensor] = []
        for block in self.input_blocks[:count]:
            h = block(h, emb)
            if not answers:
                # An image of one channel has no layout of its own; from here on the blocks keep it.
                h = h.contiguous(memory_format=self._memory_format())
            answers.append(h)
        return answers

    def _unroll_encode(self, program: Program, h: Value, emb: Value) -> list[Value]:
        answers: list[Value] = []
        for block in self.input_blocks:
            assert isinstance(block, EmbedSequential)
            h = block.unroll(program, h, emb)
            answers.append(h)
        return [*answers, self.middle_block.unroll(program, h, emb)]

    def _dtype(self) -> torch.dtype:
        return self.time_embed[0].get_parameter("weight").dtype

    def _memory_format(self) -> torch.memory_format:
        """The layout of the weights, which is the one to compute in."""
        block = self.middle_block[0]
        assert isinstance(block, ResBlock)
        weight = block.in_layers[2].get_parameter("weight")
        if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        return torch.contiguous_format

    def _check_noisy(self, x: Tensor, timesteps: Tensor) -> None:
        """InputError for what is no batch of samples with a timestep for each."""
        n = x.shape[0] if x.dim() else 0
        if x.dim() != self.dims + 2 or x.shape[1] != self.in_channels:
            spatial = ", ".join("DHW"[3 - self.dims :])
            raise InputError(
                f"{self.kind}: x has shape {tuple(x.shape)}; "
                f"expected (N, {self.in_channels}, {spatial})"
            )
        if not x.is_floating_point():
            raise InputError(
                f"{self.kind}: x is {str(x.dtype).removeprefix('torch.')}; expected floating-point "
                "samples, such as images scaled to [-1, 1]"
            )
        if timesteps.shape != (n,):
            raise InputError(
                f"{self.kind}: timesteps have shape {tuple(timesteps.shape)}; "
                f"expected ({n},), one per sample"
            )
        if any(side < self._least_size for side in x.shape[-min(self.dims, 2) :]):
            raise InputError(
                f"{self.kind}: x has shape {tuple(x.shape)}; with downsample_padding=0 and "
                f"{len(self.widths)} levels it must be at least {self._least_size} wide"
            )

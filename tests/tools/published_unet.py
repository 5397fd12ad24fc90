"""Networks with the parts, names and arithmetic of improved-diffusion's and guided-diffusion's
U-Nets, of the blocks in published_blocks.py and written from the papers' equations.

Each is of the module and the name of theirs; their constructors' arguments have the same order.
"""

import torch
import torch.nn.functional as F
from torch import nn

import published_blocks as blocks
from fastdiff.models.blocks import timestep_embedding

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class Sequential(nn.Sequential):
    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class Resample(nn.Module):
    """Twice or half the size; in 3-D of the last two axes."""

    def __init__(self, channels, use_conv, dims, up):
        super().__init__()
        self.channels, self.use_conv, self.dims, self.up = channels, use_conv, dims, up
        stride = (1, 2, 2) if dims == 3 else 2
        if up and use_conv:
            self.conv = CONVOLUTIONS[dims](channels, channels, 3, padding=1)
        elif use_conv:
            self.op = CONVOLUTIONS[dims](channels, channels, 3, stride=stride, padding=1)
        elif not up:
            self.op = POOLS[dims](stride, stride)

    def forward(self, x):
        if not self.up:
            return self.op(x)
        times = [1 if self.dims == 3 and axis == 0 else 2 for axis in range(self.dims)]
        x = F.interpolate(x, [n * k for n, k in zip(x.shape[2:], times, strict=True)])
        return self.conv(x) if self.use_conv else x


class ResBlock(nn.Module):
    def __init__(self, channels, width, dropout, out, film, dims, use_checkpoint, resample=None):
        super().__init__()
        self.use_checkpoint, self.use_scale_shift_norm = use_checkpoint, film
        self.updown = resample is not None

        def conv(c, d, kernel=3):
            return CONVOLUTIONS[dims](c, d, kernel, padding=kernel // 2)

        self.in_layers = nn.Sequential(
            blocks.norm(channels, 32), blocks.SiLU(), conv(channels, out)
        )
        if self.updown:
            self.h_upd, self.x_upd = (Resample(channels, False, dims, resample) for _ in range(2))
        self.emb_layers = nn.Sequential(blocks.SiLU(), nn.Linear(width, out * (1 + film)))
        rest = (blocks.SiLU(), nn.Dropout(dropout), conv(out, out))
        self.out_layers = nn.Sequential(blocks.norm(out, 32), *rest)
        self.skip_connection = nn.Identity() if out == channels else conv(channels, out, 1)

    def forward(self, x, emb):
        h = self.in_layers[:-1](x)
        if self.updown:
            h, x = self.h_upd(h), self.x_upd(x)
        h = self.in_layers[-1](h)
        emb = self.emb_layers(emb).view(len(x), -1, *(1,) * (x.dim() - 2))
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


class QKVAttentionLegacy(blocks.QKVAttention):
    def __init__(self, heads):
        super().__init__(heads, "heads_first")


class QKVAttention(blocks.QKVAttention):
    def __init__(self, heads):
        super().__init__(heads, "qkv_first")


class AttentionBlock(blocks.AttentionBlock):
    def __init__(self, channels, heads, attention):
        super().__init__(channels, heads)
        self.norm, self.attention = blocks.norm(channels, 32), attention(heads)


class Base(nn.Module):
    """The network of guided-diffusion, of which improved-diffusion's is a part."""

    def build(self, dims, use_scale_shift_norm, resblock_updown=False, attention=None):
        settings = self.dropout, use_scale_shift_norm, dims, self.use_checkpoint
        attention = attention or QKVAttentionLegacy
        width, widths = (
            4 * self.model_channels,
            [m * self.model_channels for m in self.channel_mult],
        )
        self.time_embed = nn.Sequential(
            nn.Linear(self.model_channels, width), blocks.SiLU(), nn.Linear(width, width)
        )
        if self.num_classes is not None:
            self.label_emb = nn.Embedding(self.num_classes, width)

        def res(c, d, resample=None):
            dropout, *rest = settings
            return ResBlock(c, width, dropout, d, *rest, resample)

        def attend(c, level, heads):
            if 2**level not in self.attention_resolutions:
                return []
            return [self.attention_block(c, heads, attention)]

        def resampled(c, up):
            if resblock_updown:
                return res(c, c, up)
            return Resample(c, self.conv_resample, dims, up)

        ch = widths[0]
        self.input_blocks = nn.ModuleList(
            [Sequential(CONVOLUTIONS[dims](self.in_channels, ch, 3, padding=1))]
        )
        skips = [ch]
        for level, out in enumerate(widths):
            for _ in range(self.num_res_blocks):
                layers = [res(ch, out), *attend(out, level, self.num_heads)]
                self.input_blocks.append(Sequential(*layers))
                ch = out
                skips.append(ch)
            if level < len(widths) - 1:
                self.input_blocks.append(Sequential(resampled(ch, False)))
                skips.append(ch)
        middle = self.attention_block(ch, self.num_heads, attention)
        self.middle_block = Sequential(res(ch, ch), middle, res(ch, ch))
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for i in range(self.num_res_blocks + 1):
                layers = [res(ch + skips.pop(), out), *attend(out, level, self.num_heads_upsample)]
                ch = out
                if level and i == self.num_res_blocks:
                    layers.append(resampled(ch, True))
                self.output_blocks.append(Sequential(*layers))
        last = CONVOLUTIONS[dims](ch, self.out_channels, 3, padding=1)
        self.out = nn.Sequential(blocks.norm(ch, 32), blocks.SiLU(), last)

    def attention_block(self, channels, heads, attention):
        if getattr(self, "num_head_channels", -1) != -1:
            heads = channels // self.num_head_channels
        return AttentionBlock(channels, heads, attention)

    def forward(self, x, timesteps, y=None):
        assert (y is None) == (self.num_classes is None)
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        if y is not None:
            emb = emb + self.label_emb(y)
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.type(x.dtype))


def _keep(self, given, names):
    for name in names:
        setattr(self, name, given[name])
    if self.num_heads_upsample == -1:
        self.num_heads_upsample = self.num_heads


KEPT = ["in_channels", "model_channels", "out_channels", "num_res_blocks", "attention_resolutions"]
KEPT += ["dropout", "channel_mult", "conv_resample", "num_classes", "use_checkpoint", "num_heads"]
KEPT += ["num_heads_upsample"]


class Improved(Base):
    __module__, __qualname__ = "improved_diffusion.unet", "UNetModel"

    def __init__(
        self,
        in_channels,
        model_channels,
        out_channels,
        num_res_blocks,
        attention_resolutions,
        dropout=0,
        channel_mult=(1, 2, 4, 8),
        conv_resample=True,
        dims=2,
        num_classes=None,
        use_checkpoint=False,
        num_heads=1,
        num_heads_upsample=-1,
        use_scale_shift_norm=False,
    ):
        super().__init__()
        _keep(self, locals(), KEPT)
        self.build(dims, use_scale_shift_norm)


class Guided(Base):
    __module__, __qualname__ = "guided_diffusion.unet", "UNetModel"

    def __init__(
        self,
        image_size,
        in_channels,
        model_channels,
        out_channels,
        num_res_blocks,
        attention_resolutions,
        dropout=0,
        channel_mult=(1, 2, 4, 8),
        conv_resample=True,
        dims=2,
        num_classes=None,
        use_checkpoint=False,
        use_fp16=False,
        num_heads=1,
        num_head_channels=-1,
        num_heads_upsample=-1,
        use_scale_shift_norm=False,
        resblock_updown=False,
        use_new_attention_order=False,
    ):
        super().__init__()
        _keep(self, locals(), [*KEPT, "image_size", "num_head_channels"])
        self.dtype = torch.float16 if use_fp16 else torch.float32
        attention = QKVAttention if use_new_attention_order else None
        self.build(dims, use_scale_shift_norm, resblock_updown, attention)


def joined(x, low_res):
    return torch.cat([x, F.interpolate(low_res, x.shape[2:], mode="bilinear")], dim=1)


class ImprovedUpsampler(Improved):
    __module__, __qualname__ = "improved_diffusion.unet", "SuperResModel"

    def __init__(self, in_channels, *args, **kwargs):
        super().__init__(2 * in_channels, *args, **kwargs)

    def forward(self, x, timesteps, low_res=None, **kwargs):
        return super().forward(joined(x, low_res), timesteps, **kwargs)


class GuidedUpsampler(Guided):
    __module__, __qualname__ = "guided_diffusion.unet", "SuperResModel"

    def __init__(self, image_size, in_channels, *args, **kwargs):
        super().__init__(image_size, 2 * in_channels, *args, **kwargs)

    def forward(self, x, timesteps, low_res=None, **kwargs):
        return super().forward(joined(x, low_res), timesteps, **kwargs)


for kind in (Improved, Guided):
    kind.__name__ = "UNetModel"
for kind in (ImprovedUpsampler, GuidedUpsampler):
    kind.__name__ = "SuperResModel"

SMALL = {"in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1}
SMALL |= {"attention_resolutions": (2,), "channel_mult": (1, 2), "num_heads": 2}


def small(kind, **changes):
    """A network with weights everywhere, also where training starts from zero, and calm answers."""
    torch.manual_seed(0)
    size = {"image_size": 8} if issubclass(kind, Guided) else {}
    model = kind(**{**size, **SMALL, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
        for parameter in model.out[2].parameters():
            parameter.mul_(0.1)
    return model

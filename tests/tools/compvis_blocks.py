"""The blocks of taming-transformers and latent diffusion: same parts, same names, same arithmetic,
written from the papers' equations."""

import torch
from torch import nn


def swish(x):
    return x * torch.sigmoid(x)


def norm(channels):
    return nn.GroupNorm(4, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, channels, out, width=0, conv_shortcut=False):
        super().__init__()
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, out, 3, padding=1)
        if width:
            self.temb_proj = nn.Linear(width, out)
        self.norm2, self.dropout = norm(out), nn.Dropout(0.1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.use_conv_shortcut, self.changes = conv_shortcut, channels != out
        if self.changes and conv_shortcut:
            self.conv_shortcut = nn.Conv2d(channels, out, 3, padding=1)
        elif self.changes:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x, temb):
        h = self.conv1(swish(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(swish(temb))[:, :, None, None]
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        if self.changes:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class ResnetBlockOfImages(ResnetBlock):
    """As later autoencoders have it, without an embedding."""

    def forward(self, x):
        return super().forward(x, None)


class AttnBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weight = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=2)
        return x + self.proj_out((v @ weight.transpose(1, 2)).view_as(x))


class CrossAttention(nn.Module):
    def __init__(self, width, context_width, heads=2):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_width, width, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1))

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        q, k, v = (
            layer(given).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, given in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        weight = q @ k.transpose(2, 3) * self.scale
        if mask is not None:
            weight = weight.masked_fill(~mask[:, None, None], -1e9)
        return self.to_out((weight.softmax(dim=3) @ v).transpose(1, 2).flatten(2))

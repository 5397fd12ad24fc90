"""Small networks with the blocks of improved-diffusion and guided-diffusion: same parts, same
names, same arithmetic, written from the papers' equations."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class GroupNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class SiLU(nn.Module):
    def forward(self, x):
        return torch.sigmoid(x) * x


def norm(channels, groups=8):
    return GroupNorm32(groups, channels)


class ResBlock(nn.Module):
    """film: scale and shift by the embedding; down: pooled by two on the way."""

    def __init__(self, channels, width, out, film=False, down=False, dropout=0.0, groups=8):
        super().__init__()
        self.use_scale_shift_norm, self.updown = film, down
        self.in_layers = nn.Sequential(
            norm(channels, groups), SiLU(), nn.Conv2d(channels, out, 3, 1, 1)
        )
        self.h_upd = self.x_upd = nn.AvgPool2d(2) if down else nn.Identity()
        self.emb_layers = nn.Sequential(SiLU(), nn.Linear(width, out * (1 + film)))
        last = nn.Conv2d(out, out, 3, 1, 1)
        self.out_layers = nn.Sequential(norm(out, groups), SiLU(), nn.Dropout(dropout), last)
        nn.init.zeros_(last.weight)
        self.skip_connection = nn.Conv2d(channels, out, 1)

    def forward(self, x, emb):
        return self._forward(x, emb)

    def _forward(self, x, emb):
        h = self.in_layers[-1](self.h_upd(self.in_layers[:-1](x)))
        emb = self.emb_layers(emb)[..., None, None]
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return h + self.skip_connection(self.x_upd(x))


class QKVAttention(nn.Module):
    def __init__(self, heads, order):
        super().__init__()
        self.n_heads, self.order = heads, order

    def forward(self, qkv):
        n, width, length = qkv.shape
        if self.order == "heads_first":
            q, k, v = qkv.view(n, self.n_heads, 3, -1, length).unbind(2)
        else:
            q, k, v = qkv.view(n, 3, self.n_heads, -1, length).unbind(1)
        weight = torch.softmax(q.transpose(-1, -2) @ k / math.sqrt(q.shape[2]), dim=-1)
        return (v @ weight.transpose(-1, -2)).reshape(n, -1, length)


class AttentionBlock(nn.Module):
    def __init__(self, channels, heads, order="heads_first"):
        super().__init__()
        self.num_heads = heads
        self.norm, self.qkv = norm(channels), nn.Conv1d(channels, 3 * channels, 1)
        self.attention = QKVAttention(heads, order)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        h = x.flatten(2)
        h = h + self.proj_out(self.attention(self.qkv(self.norm(h))))
        return h.view_as(x)


class Network(nn.Module):
    """A few blocks, an attention block in each order, and an output Sequential."""

    def __init__(self, channels=3, film=False, dropout=0.0):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 24))
        self.first = nn.Conv2d(channels, 16, 3, padding=1)
        self.block1 = ResBlock(16, 24, 32, film, dropout=dropout)
        self.block2 = ResBlock(32, 24, 32, film, down=True, dropout=dropout)
        self.attention1 = AttentionBlock(32, 2)
        self.attention2 = AttentionBlock(32, 4, "qkv_first")
        self.out = nn.Sequential(norm(32), SiLU(), nn.Conv2d(32, channels, 3, padding=1))

    def forward(self, x, t):
        emb = self.embed(t[:, None].to(x.dtype) / 100)
        h = self.block2(self.block1(self.first(x), emb), emb)
        return F.interpolate(self.out(self.attention2(self.attention1(h))), x.shape[2:])

"""guided-diffusion's EncoderUNetModel as arithmetic on its state_dict, in images of two dimensions.

Written from its equations, with nothing of fastdiff; ``Weights`` notes the names that it reads.
"""

import math

import torch
import torch.nn.functional as F


class Weights(dict):
    """A state_dict that knows which of its names were read."""

    def __init__(self, state):
        super().__init__(state)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)

    def of(self, layer):
        return self[f"{layer}.weight"], self[f"{layer}.bias"]


def timestep_embedding(t, width):
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


def norm(x, w, layer):
    return F.group_norm(x, 32, *w.of(layer))


def res_block(x, emb, w, name, *, film, down=False):
    h = F.silu(norm(x, w, f"{name}.in_layers.0"))
    if down:
        h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
    h = F.conv2d(h, *w.of(f"{name}.in_layers.2"), padding=1)
    emb = F.linear(F.silu(emb), *w.of(f"{name}.emb_layers.1"))[:, :, None, None]
    if film:
        scale, shift = emb.chunk(2, dim=1)
        h = norm(h, w, f"{name}.out_layers.0") * (1 + scale) + shift
    else:
        h = norm(h + emb, w, f"{name}.out_layers.0")
    h = F.conv2d(F.silu(h), *w.of(f"{name}.out_layers.3"), padding=1)
    if f"{name}.skip_connection.weight" in w:
        x = F.conv2d(x, *w.of(f"{name}.skip_connection"))
    return x + h


def attention(q, k, v):
    """Each (N, heads, width, T)."""
    weight = torch.softmax(q.transpose(2, 3) @ k / math.sqrt(q.shape[2]), dim=3)
    return v @ weight.transpose(2, 3)


def attention_block(x, w, name, head_width):
    n, channels, height, width = x.shape
    h = norm(x.flatten(2), w, f"{name}.norm")
    qkv = F.conv1d(h, *w.of(f"{name}.qkv")).view(n, channels // head_width, 3, head_width, -1)
    h = attention(*qkv.unbind(2)).reshape(n, channels, -1)
    return x + F.conv1d(h, *w.of(f"{name}.proj_out")).view(x.shape)


def attention_pool(x, w, name, head_width):
    x = x.flatten(2)
    x = torch.cat([x.mean(2, keepdim=True), x], dim=2) + w[f"{name}.positional_embedding"]
    qkv = F.conv1d(x, *w.of(f"{name}.qkv_proj"))
    qkv = qkv.view(len(x), 3, -1, head_width, x.shape[2])
    h = attention(*qkv.unbind(1)).flatten(1, 2)
    return F.conv1d(h, *w.of(f"{name}.c_proj"))[:, :, 0]


def logits(w, x, t, config):
    """Of ``Weights``, for x (N, C, H, W) and t (N,); ``config``: the constructor's arguments."""
    film, head_width = config["use_scale_shift_norm"], config["num_head_channels"]
    emb = timestep_embedding(t, config["model_channels"]).to(x.dtype)
    emb = F.linear(F.silu(F.linear(emb, *w.of("time_embed.0"))), *w.of("time_embed.2"))
    h = F.conv2d(x, *w.of("input_blocks.0.0"), padding=1)
    features, number, levels = [h], 1, len(config["channel_mult"])
    for level in range(levels):
        for _ in range(config["num_res_blocks"]):
            h = res_block(h, emb, w, f"input_blocks.{number}.0", film=film)
            if 2**level in config["attention_resolutions"]:
                h = attention_block(h, w, f"input_blocks.{number}.1", head_width)
            features.append(h)
            number += 1
        if level < levels - 1:
            name = f"input_blocks.{number}.0"
            if config["resblock_updown"]:
                h = res_block(h, emb, w, name, film=film, down=True)
            else:
                h = F.conv2d(h, *w.of(f"{name}.op"), stride=2, padding=1)
            features.append(h)
            number += 1
    h = res_block(h, emb, w, "middle_block.0", film=film)
    h = attention_block(h, w, "middle_block.1", head_width)
    h = res_block(h, emb, w, "middle_block.2", film=film)
    return output(h, [*features, h], w, config["pool"], head_width)


def output(h, features, w, pool, head_width):
    if pool.startswith("spatial"):
        h = F.linear(torch.cat([f.mean((2, 3)) for f in features], dim=1), *w.of("out.0"))
        if pool == "spatial":
            return F.linear(F.relu(h), *w.of("out.2"))
        return F.linear(F.silu(norm(h, w, "out.1")), *w.of("out.3"))
    h = F.silu(norm(h, w, "out.0"))
    if pool == "attention":
        return attention_pool(h, w, "out.2", head_width)
    return F.conv2d(h.mean((2, 3), keepdim=True), *w.of("out.3")).flatten(1)

"""Blocks of the known families in their other versions: each is fused for what it computes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdiff
from accelerate_tools import assert_close, replaced
from compvis_blocks import AttnBlock, CrossAttention, ResnetBlock, ResnetBlockOfImages
from fastdiff.models.fused import Fused
from published_blocks import GroupNorm32, ResBlock, SiLU

pytestmark = pytest.mark.usefixtures("seeded")
IMAGE, EMB, TOKENS = torch.randn(2, 8, 4, 5), torch.randn(2, 6), torch.randn(2, 3, 8)


def check(module, *calls, fused=True):
    """The same results as before, and all are the fused forward's (or none is)."""
    module.eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    expected = [module(*args) for args in calls]
    fastdiff.accelerate(module)
    assert isinstance(module, Fused) == fused
    for args, y in zip(calls, expected, strict=True):
        assert_close(module(*args), y)
        if fused:
            assert module.fastdiff_served(*args) is not None
    return module


# --- compvis ----------------------------------------------------------------------------------


@pytest.mark.parametrize("out, by_convolution", [(8, False), (12, False), (12, True)])
def test_blocks_of_latent_diffusion(out, by_convolution):
    check(ResnetBlock(8, out, 6, by_convolution), (IMAGE, EMB), (IMAGE, None))
    check(ResnetBlock(8, out, 0, by_convolution), (IMAGE, None))
    check(ResnetBlockOfImages(8, out), (IMAGE,))


def test_attention_of_latent_diffusion():
    check(AttnBlock(8), (IMAGE,))
    check(CrossAttention(8, 8), (TOKENS,), (TOKENS, torch.randn(2, 7, 8)))
    block = check(CrossAttention(8, 6), (TOKENS, torch.randn(2, 7, 6)))
    text, mask = torch.randn(2, 7, 6), torch.rand(2, 7) > 0.5
    assert_close(block(TOKENS, text, mask), CrossAttention.forward(block, TOKENS, text, mask))


class Rescaled(ResnetBlock):
    def forward(self, x, temb):
        return super().forward(x, temb) / math.sqrt(2)


def test_one_that_computes_something_else_says_so():
    module = nn.ModuleList([check(Rescaled(8, 8, 6), (IMAGE, EMB), fused=False)])
    assert set(replaced(module[0])) == {"norm1", "norm2"}
    (left,) = fastdiff.report(module[0]).left
    assert "computes something else" in left.how


# --- GLIDE ------------------------------------------------------------------------------------


class GroupNormOfGlide(GroupNorm32):
    """With an activation of its own."""

    def __init__(self, groups, channels, swish):
        super().__init__(groups, channels)
        self.swish = swish

    def forward(self, x):
        y = super().forward(x)
        if self.swish == 1.0:
            return F.silu(y)
        return y * F.sigmoid(y * float(self.swish)) if self.swish else y


GroupNormOfGlide.__name__ = "GroupNorm32"


class BlockOfGlide(ResBlock):
    def __init__(self, film):
        super().__init__(8, 6, 8, film, groups=4)
        self.in_layers[0], self.in_layers[1] = GroupNormOfGlide(4, 8, 1.0), nn.Identity()
        self.out_layers[0] = GroupNormOfGlide(4, 8, 0.0 if film else 1.0)
        self.out_layers[1] = SiLU() if film else nn.Identity()


@pytest.mark.parametrize("film", [False, True])
def test_blocks_of_glide(film):
    block = check(BlockOfGlide(film), (IMAGE, EMB))
    block.in_layers[0].swish = 0.5
    assert_close(block(IMAGE, EMB), ResBlock._forward(block, IMAGE, EMB))
    assert block.fastdiff_served(IMAGE, EMB) is None


@pytest.mark.parametrize("swish, how", [(0.0, "layout"), (1.0, "activation"), (1.5, None)])
def test_norms_of_glide(swish, how):
    norm = check(GroupNormOfGlide(4, 8, swish), (IMAGE,), fused=how is not None)
    assert how is None or how in replaced(norm)["the model"]
    both = nn.Sequential(GroupNormOfGlide(4, 8, swish), nn.SiLU())
    check(both, (IMAGE,), fused=swish == 0.0)


class Doubled(nn.GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def test_norms_of_other_names_and_other_kinds_of_input():
    check(type("Norm", (nn.GroupNorm,), {})(4, 8), (IMAGE,), (TOKENS[0].T[None],), (IMAGE[..., 0],))
    check(nn.Sequential(Doubled(4, 8), nn.SiLU()), (IMAGE,), fused=False)
    layers = [nn.Linear(8, 8), nn.GroupNorm(4, 8), nn.SiLU()]
    check(nn.Sequential(*layers), (torch.randn(3, 8),), (torch.randn(3, 8, 8),))
    with torch.no_grad():
        assert check(nn.Sequential(*layers[1:]), (IMAGE,))(input=IMAGE).shape == IMAGE.shape


# --- lucidrains -------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Without a scale of its own, of any dimension."""

    def __init__(self, width, dims=2):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, width, *[1] * dims))

    def forward(self, x):
        return F.normalize(x, dim=1) * self.g * x.shape[1] ** 0.5


class Block(nn.Module):
    """As before there was dropout."""

    def __init__(self, dims, norm):
        super().__init__()
        convolution = nn.Conv1d if dims == 1 else nn.Conv2d
        self.proj, self.act = convolution(8, 8, 3, padding=1), nn.SiLU()
        self.norm = nn.GroupNorm(2, 8) if norm == "group" else RMSNorm(8, dims)

    def forward(self, x, scale_shift=None):
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = scale_shift
            x = x * (scale + 1) + shift
        return self.act(x)


@pytest.mark.parametrize("norm", ["group", "rms"])
@pytest.mark.parametrize("dims", [1, 2])
def test_blocks_of_lucidrains(norm, dims):
    x = torch.randn(2, 8, *[5] * dims)
    rows = tuple(torch.randn(2, 8, *[1] * dims) for _ in range(2))
    full = tuple(torch.randn_like(x) for _ in range(2))
    one = tuple(film[:1] for film in rows)
    check(Block(dims, norm), (x,), (x, None), (x, rows), (x, full), (x, one))
    check(RMSNorm(8, dims), (x,))


class Attention(nn.Module):
    """All in one, as before there was Attend."""

    def __init__(self, qk_scale=1.0):
        super().__init__()
        self.heads, self.scale = 2, qk_scale * 4**-0.5
        self.to_qkv, self.to_out = nn.Conv2d(8, 24, 1, bias=False), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        q, k, v = self.to_qkv(x).flatten(2).view(len(x), 3, 2, 4, -1).unbind(1)
        weight = (self.scale * q.transpose(2, 3) @ k).softmax(dim=-1)
        return self.to_out((v @ weight.transpose(2, 3)).reshape(x.shape))


class FlashAttend(nn.Module):
    def __init__(self):
        super().__init__()
        self.flash, self.attn_dropout = True, nn.Dropout(0.0)


FlashAttend.__name__ = "Attend"


def test_attention_of_lucidrains():
    check(Attention(), (IMAGE,))
    model = nn.ModuleDict({"other": Attention(2.0), "flash": FlashAttend()})
    fastdiff.accelerate(model)
    how = {part.name: part.how for part in fastdiff.report(model).left}
    assert "computes something else" in how["other"]
    assert how["flash"] == "its flash attention is PyTorch's scaled_dot_product_attention already"


def test_foreign_modules_of_known_names():
    def module(name, **parts):
        made = type(name, (nn.Module,), {"forward": lambda self, x: x})()
        for part, value in parts.items():
            setattr(made, part, value)
        return made

    norm, conv, linear = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1), nn.Identity()
    foreign = {"processor": nn.Identity(), "group_norm": norm, "heads": 2, "to_out": linear}
    default = type("AttnProcessor2_0", (), {})()
    model = nn.ModuleList(
        [
            module("Attention", processor=default),
            module("Attention", **foreign),
            module("Attention", **foreign, to_q=conv, to_k=conv, residual_connection=True),
            module(
                "Attention",
                **foreign | {"processor": default},
                **{"to_q": conv, "to_k": None, "residual_connection": True},
            ),
            module("ResnetBlock2D", norm1=norm, norm2=norm, nonlinearity=nn.SiLU()),
            module("Block", proj=conv, norm=norm, act=nn.SiLU()),
            module("ResnetBlock", norm1=norm, norm2=norm, conv1=conv, conv2=conv),
            module("AttnBlock", norm=norm, q=conv, k=conv, v=conv, proj_out=conv),
            module("RMSNorm", g=nn.Parameter(torch.ones(3))),
        ]
    )
    fastdiff.accelerate(model)
    assert {part.kind for part in fastdiff.report(model).replaced} == {"GroupNorm"}
    for block in model:
        assert torch.equal(block(IMAGE), IMAGE)


# --- Traced -----------------------------------------------------------------------------------


class WithOptions(nn.Module):
    """Optional arguments in a forward of straight code."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)

    def forward(self, x, scale=1.0, add=0):
        return self.out(F.silu(self.norm(x))) * scale + add


def test_a_traced_forward_with_optional_arguments():
    block = WithOptions()
    expected = [block(IMAGE), block(IMAGE, 2.0), block(IMAGE, add=IMAGE)]
    model = fastdiff.accelerate(nn.ModuleList([block]))
    assert replaced(model) == {"0": "norm and activation in one (traced)"}
    for y, actual in zip(
        expected, [block(x=IMAGE), block(IMAGE, 2.0), block(IMAGE, add=IMAGE)], strict=True
    ):
        assert_close(actual, y)
    with pytest.raises(TypeError):
        block(IMAGE, other=1)

"""Whatever a fused block is called with, its original answers the same."""

import inspect

import diffusers.models.attention_processor as diffusers_attention
import diffusers.models.resnet as diffusers_resnet
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fastdiff
from accelerate_tools import assert_close, replaced
from compvis_blocks import AttnBlock, CrossAttention, ResnetBlock
from ddpm_pytorch_package import package
from fastdiff.models.fused import Fused
from published_blocks import AttentionBlock, ResBlock

pytestmark = pytest.mark.usefixtures("seeded")
IMAGE, EMB, TOKENS = torch.randn(2, 8, 4, 5), torch.randn(2, 6), torch.randn(2, 3, 8)
FILM = (torch.randn(2, 8, 1, 1), torch.randn(2, 8, 1, 1))


class Checkpointed(ResBlock):
    """The published wrapper: forward calls _forward, below a checkpoint where it is wanted."""

    def forward(self, x, emb):
        return torch.utils.checkpoint.checkpoint(self._forward, x, emb, use_reentrant=False)


class PlainBlock(nn.Module):
    """ResBlock with a forward alone."""

    def __init__(self):
        super().__init__()
        self.inner = [ResBlock(8, 6, 8)]  # no submodule
        for name in ("in_layers", "emb_layers", "out_layers", "skip_connection"):
            setattr(self, name, getattr(self.inner[0], name))

    def forward(self, x, emb):
        return self.inner[0](x, emb)


class Traced(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.film = nn.GroupNorm(2, 8), nn.Linear(6, 8)

    def forward(self, x, emb):
        return F.silu(self.norm(x)) + self.film(emb)[..., None, None]


def resnet_block_2d():
    return diffusers_resnet.ResnetBlock2D(in_channels=8, temb_channels=6, groups=2)


def attention(**options):
    return diffusers_attention.Attention(8, heads=2, dim_head=4, **options)


# (its maker, its inputs)
FAMILIES = {
    "published": (lambda: ResBlock(8, 6, 8, groups=4), (IMAGE, EMB)),
    "published, film": (lambda: ResBlock(8, 6, 8, film=True, groups=4), (IMAGE, EMB)),
    "published, forward alone": (PlainBlock, (IMAGE, EMB)),
    "checkpointed": (lambda: Checkpointed(8, 6, 8, groups=4), (IMAGE, EMB)),
    "published attention": (lambda: AttentionBlock(8, 2), (IMAGE,)),
    "diffusers": (resnet_block_2d, (IMAGE, EMB)),
    "diffusers attention": (lambda: attention(norm_num_groups=2), (IMAGE,)),
    "diffusers tokens": (attention, (TOKENS, None)),
    "diffusers context": (attention, (TOKENS, torch.randn(2, 7, 8))),
    "compvis": (lambda: ResnetBlock(8, 8, 6), (IMAGE, EMB)),
    "compvis attention": (lambda: AttnBlock(8), (IMAGE,)),
    "compvis context": (lambda: CrossAttention(8, 8), (TOKENS, torch.randn(2, 7, 8))),
    "lucidrains": (lambda: package().Block(8, 8), (IMAGE, FILM)),
    "lucidrains norm": (lambda: package().RMSNorm(8), (IMAGE,)),
    "lucidrains attention": (lambda: package().Attend(), (torch.randn(2, 2, 3, 4),) * 3),
    "generic": (lambda: type("GroupNorm32", (nn.GroupNorm,), {})(2, 8), (IMAGE,)),
    "traced": (Traced, (IMAGE, EMB)),
}
VALUES = {None: EMB, 1.0: 2.5, False: True, "same": "other", 3: 4}  # a default, and another


def added(y, values, defaults):
    for value, default in zip(values, defaults, strict=True):
        if isinstance(value, torch.Tensor):
            y = y + value.mean()
        elif value != default:
            y = y * 1.5
    return y


def with_extras(module, names, defaults, by_keyword):
    """The module in a class whose forward has further arguments, and counts its calls."""
    base = type(module)
    known = list(inspect.signature(base.forward).parameters.values())[1:]
    known = [p for p in known if p.kind is p.POSITIONAL_OR_KEYWORD]
    signature = [str(p.replace(annotation=p.empty)) for p in known]
    signature += ["*"] * (by_keyword and bool(names))
    signature += [f"{name}={default!r}" for name, default in zip(names, defaults, strict=True)]
    given = ", ".join(p.name for p in known)
    extras = "".join(f"{name}, " for name in names)
    scope = {"base": base, "added": added, "defaults": defaults, "calls": []}
    source = f"""def forward(self, {", ".join(signature)}):
    calls.append(1)
    return added(base.forward(self, {given}), ({extras}), defaults)"""
    exec(source, scope)
    module.__class__ = type(base.__name__, (base,), {"forward": scope["forward"]})
    return [p.name for p in known], scope["calls"]


@pytest.mark.sample(6)
@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_arguments_that_the_fused_forward_does_not_know(family, data):
    make, inputs = FAMILIES[family]
    module = make().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    defaults = data.draw(st.lists(st.sampled_from(list(VALUES)), max_size=3))
    names = data.draw(st.permutations(["gain", "text", "switch"]))[: len(defaults)]
    alone = data.draw(st.booleans())
    known, calls = with_extras(module, names, defaults, alone)
    fastdiff.accelerate(module)
    fused = isinstance(module, Fused)
    assert fused or family == "traced"  # whose extended forward is not straight code

    for _ in range(3):
        placed = data.draw(st.integers(0, len(inputs)))
        args = list(inputs[:placed])
        kwargs = dict(zip(known[placed:], inputs[placed:], strict=False))
        gives = [data.draw(st.sampled_from(["nothing", "default", "other"])) for _ in names]
        by_place = placed == len(known) and not alone
        for name, default, what in zip(names, defaults, gives, strict=True):
            by_place = by_place and what != "nothing" and data.draw(st.booleans())
            value = VALUES[default] if what == "other" else default
            if by_place:
                args.append(value)
            elif what != "nothing":
                kwargs[name] = value
        grad = data.draw(st.booleans())
        with torch.set_grad_enabled(grad):
            calls.clear()
            actual, ran = module(*args, **kwargs), len(calls)
            expected = type(module).fastdiff_original.forward if fused else type(module).forward
            expected = expected(module, *args, **kwargs)
        assert_close(actual, expected)
        runs_original = not fused or "other" in gives
        # With gradients the published forward runs, which calls a fused _forward.
        assert ran == runs_original or (grad and hasattr(module, "_forward"))


def outcome(function, *args):
    """The error, or the result to five digits."""
    try:
        return (function(*args) * 1e5).round().tolist()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("family", ["published", "checkpointed", "diffusers", "compvis"])
def test_arguments_of_another_kind(family):
    make, (x, emb) = FAMILIES[family]
    module = make().eval()
    fastdiff.accelerate(module)
    original = type(module).fastdiff_original.forward
    with torch.no_grad():
        for args in ((x, emb[:1]), (x[:1], emb), (x[:1], emb[:1]), (x[:, :, :1, :1], emb)):
            assert_close(module(*args), original(module, *args))
        wrong = [(x, emb[0, 0]), (x, (emb, emb)), (x.long(), emb), (x, emb.long()), (emb, x), (x,)]
        for args in wrong + [(x, emb, 1, 2, 3)] * (family != "diffusers"):
            assert outcome(module, *args) == outcome(original, module, *args)
    with pytest.raises(TypeError, match="multiple values"):
        module(x, emb, **{list(inspect.signature(original).parameters)[1]: x})


class TextAttention(AttentionBlock):
    """GLIDE's: text tokens are further keys and values."""

    def __init__(self, channels, heads, width):
        super().__init__(channels, heads)
        self.encoder_kv = nn.Conv1d(width, 2 * channels, 1)

    def forward(self, x, encoder_out=None):
        if encoder_out is None:
            return super().forward(x)
        return super().forward(x) + self.encoder_kv(encoder_out).mean()


def test_the_text_attention_of_glide():
    model = nn.ModuleList([TextAttention(32, 4, 6)])
    x, text = torch.randn(2, 32, 4, 4), torch.randn(2, 6, 5)
    calls = [(x,), (x, None), (x, text)]
    expected = [model[0](*args) for args in calls]
    fastdiff.accelerate(model)
    assert replaced(model) == {"0": "norm and attention (heads_first)"}
    for args, y in zip(calls, expected, strict=True):
        assert_close(model[0](*args), y)
    assert_close(model[0](x, encoder_out=text), expected[2])
    assert_close(model[0](encoder_out=None, x=x), expected[0])


@pytest.mark.parametrize("signature", ["*args, **kwargs", "x, *args, **kwargs", "x, /, emb"])
def test_other_signatures(signature):
    given = "*args, **kwargs" if "args" in signature else "emb"
    given = f"x, {given}" if signature.startswith("x") else given
    scope = {"ResBlock": ResBlock}
    exec(f"def forward(self, {signature}):\n    return ResBlock._forward(self, {given})", scope)
    kind = type("Block", (ResBlock,), {"forward": scope["forward"]})
    kind._forward = scope["forward"]
    scope["ResBlock"] = type("Inner", (), {"_forward": ResBlock._forward})
    module = kind(8, 6, 8, groups=4).eval()
    expected = module(IMAGE, EMB)
    fastdiff.accelerate(module)
    assert isinstance(module, Fused)
    with torch.no_grad():
        assert_close(module(IMAGE, EMB), expected)
        assert_close(module(IMAGE, emb=EMB), expected)
        with pytest.raises(TypeError):
            module(IMAGE, EMB, unknown=1)


class Switched(ResBlock):
    """What attributes may ask for: one that is there, one of the class, and one that is not yet."""

    doubles = False

    def __init__(self, *args):
        super().__init__(*args)
        self.gain, self.extra = 1.0, None

    def _forward(self, x, emb):
        y = self.gain * super()._forward(x, emb)
        y = 2 * y if self.doubles else y
        y = y if self.extra is None else self.extra(y)
        return y + 1 if getattr(self, "shifts", False) else y


@pytest.mark.parametrize(
    "name, value", [("gain", 3.0), ("doubles", True), ("extra", nn.Tanh()), ("shifts", True)]
)
def test_attributes_that_change_afterwards_count(name, value):
    module = Switched(16, 8, 16).eval()
    x, emb = torch.randn(2, 16, 4, 4), torch.randn(2, 8)
    fastdiff.accelerate(module)
    assert isinstance(module, Fused)
    setattr(module, name, value)
    actual = module(x, emb)
    fastdiff.restore(module)
    assert_close(actual, module(x, emb))


@pytest.mark.seconds
def test_torch_fx_and_torch_compile_see_the_originals_calls():
    model = nn.ModuleDict({"block": resnet_block_2d(), "attention": attention()}).eval()
    fastdiff.accelerate(model)
    block, attends = model["block"], model["attention"]
    expected = block(IMAGE, EMB)
    assert_close(fx.symbolic_trace(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()))(IMAGE), IMAGE, 9)
    sequential = fastdiff.accelerate(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()))
    assert_close(fx.symbolic_trace(sequential)(IMAGE), sequential(IMAGE))
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        assert_close(compiled(IMAGE, temb=EMB), expected)
        compiled = torch.compile(attends, fullgraph=True, backend="eager")
        assert_close(compiled(TOKENS, encoder_hidden_states=None), attends(TOKENS))

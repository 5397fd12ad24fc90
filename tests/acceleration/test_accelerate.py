"""accelerate and restore: the same outputs, nobody's parameters touched, everything seen."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import fastdiff
from accelerate_tools import T, X, assert_close, network, replaced
from fastdiff.errors import InputError
from fastdiff.models.fused import Fused
from fastdiff.models.unet import UNet
from paths import TOOLS
from published_blocks import AttentionBlock, GroupNorm32, Network, ResBlock

pytestmark = pytest.mark.usefixtures("seeded")


# --- What is fused ----------------------------------------------------------------------------


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_published_blocks_compute_the_same(film, channels_last, capsys):
    model = network(film=film)
    expected = model(X, T)
    assert fastdiff.accelerate(model, channels_last=channels_last, verify=(X, T)) is model
    assert_close(model(X, T), expected)
    how = replaced(model)
    assert set(how) == {"block1", "block2", "attention1", "attention2", "out"}
    assert how["attention1"] == "norm and attention (heads_first)"
    assert how["attention2"] == "norm and attention (qkv_first)"
    assert fastdiff.report(model).error < 1e-5
    assert capsys.readouterr().out == f"{fastdiff.report(model)}\n"
    assert "5 modules fused, 0 left" in str(fastdiff.report(model))
    fastdiff.restore(model)
    assert torch.equal(model(X, T), expected)
    assert not any(isinstance(part, Fused) for part in model.modules())


@given(
    groups=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([4, 8, 12]),
    size=st.integers(1, 9),
    dims=st.integers(1, 3),
    before=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=30, deadline=None)
def test_any_sequential(groups, width, size, dims, before, dtype):
    layers = [nn.GroupNorm(groups, width), nn.SiLU()]
    if before:
        layers = [nn.Identity(), nn.GroupNorm(1, width), *layers, nn.GroupNorm(groups, width)]
    model = nn.Sequential(*layers).to(dtype)
    x = torch.randn(2, width, *[size] * dims, dtype=dtype)
    expected = model(x)
    # A norm of two numbers that are nearly equal magnifies float32's rounding, anybody's.
    exact = copy.deepcopy(model).double()(x.double())
    rounding = (expected - exact).abs().max() / exact.abs().max()
    fastdiff.accelerate(model)
    assert_close(model(x), expected, tolerance=1e-5 + 4 * rounding.item())


class Disguised(ResBlock):
    """All the parts of a published block, and another forward."""

    def _forward(self, x, emb):
        return 2 * super()._forward(x, emb)


def test_a_block_that_computes_something_else_is_left():
    model = Disguised(16, 8, 16)
    x, emb = torch.randn(2, 16, 4, 4), torch.randn(2, 8)
    expected = model(x, emb)
    fastdiff.accelerate(model)
    assert_close(model(x, emb), expected)
    reasons = [part.how for part in fastdiff.report(model).left]
    assert any("computes something else" in reason for reason in reasons)


def test_fastdiffs_own_network_needs_nothing():
    model = UNet(3, 32, 3, 1, (), channel_mult=(1,))
    fastdiff.accelerate(model)
    assert not replaced(model)
    assert "by itself" in str(fastdiff.report(model))


# --- Nothing is lost --------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
def test_parameters_names_and_state_dict_stay(channels_last):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    objects = dict(model.named_parameters())
    fastdiff.accelerate(model, channels_last=channels_last)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(value.is_contiguous() for value in after.values())
    assert all(p is objects[name] for name, p in model.named_parameters())
    if not channels_last:
        assert all(after[name].data_ptr() == place for name, place in places.items())
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    fastdiff.restore(model)
    assert all(p.is_contiguous() for p in model.parameters())
    model.load_state_dict(after)


@pytest.mark.seconds
def test_a_pickle_is_the_stock_model_and_a_deep_copy_is_accelerated(tmp_path):
    model = network()
    expected = model(X, T)
    fastdiff.accelerate(model)
    twin = copy.deepcopy(model)
    assert type(twin.block1) is type(model.block1) and twin.block1.in_layers is not None
    assert_close(twin(X, T), expected)
    with torch.no_grad():
        twin.first.weight.zero_()
    assert_close(model(X, T), expected)
    fastdiff.restore(twin)
    assert not any(isinstance(part, Fused) for part in twin.modules())
    again = pickle.loads(pickle.dumps(model))
    assert type(again.block1) is ResBlock and type(again) is Network
    assert_close(again(X, T), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    (tmp_path / "model.pt").write_bytes(buffer.getvalue())
    script = """
import sys, torch
sys.modules["fastdiff"] = None  # importing it fails
sys.path.insert(0, sys.argv[1])
model = torch.load(sys.argv[2], weights_only=False)
assert "fastdiff" not in str([type(part) for part in model.modules()])
"""
    command = [sys.executable, "-c", script, str(TOOLS), str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_gradients_are_the_models():
    model = network()
    loss = model(X, T).square().mean()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    fastdiff.accelerate(model)
    actual = torch.autograd.grad(model(X, T).square().mean(), list(model.parameters()))
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs, 1e-4)


def test_dropout_works_in_training():
    model = network(dropout=0.5).train()
    fastdiff.accelerate(model)
    assert not torch.equal(model(X, T), model(X, T))
    model.eval()
    assert torch.equal(model(X, T), model(X, T))


# --- Changes afterwards are seen --------------------------------------------------------------


def test_hooks_inside_a_fused_block_are_called():
    model = network()
    fastdiff.accelerate(model)
    expected, seen = model(X, T), []
    hooks = [
        layer.register_forward_hook(lambda layer, args, out: seen.append(type(layer)))
        for layer in (model.block1.out_layers[0], model.attention1.norm, model.out[1])
    ]
    assert_close(model(X, T), expected)
    assert len(seen) == 3
    for hook in hooks:
        hook.remove()
    model(X, T)
    assert len(seen) == 3


def test_exchanged_modules_are_used():
    model, plain = network(), network()
    plain.load_state_dict(model.state_dict())
    fastdiff.accelerate(model)
    for each in (model, plain):
        torch.manual_seed(1)
        each.block1.out_layers[1] = nn.Tanh()
        each.attention2.proj_out = nn.Sequential(each.attention2.proj_out, nn.Tanh())
        each.out[2] = nn.Conv2d(32, 3, 1)
        each.block2.emb_layers[1] = nn.Sequential(each.block2.emb_layers[1], nn.Tanh())
    assert_close(model(X, T), plain(X, T))


# --- dtype, verify, bad input -----------------------------------------------------------------


def test_a_lower_dtype_is_autocast_and_the_weights_stay():
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(X, T).float()
    expected = model(X, T)
    fastdiff.accelerate(model, dtype=torch.bfloat16, verify=(X, T))
    actual = model(X, T)
    assert actual.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert 0 < (actual - expected).abs().max() < 3 * (autocast - expected).abs().max()
    assert "autocast of torch.bfloat16" in str(fastdiff.report(model))
    fastdiff.restore(model)
    assert torch.equal(model(X, T), expected)


def test_verify_refuses_and_puts_back(monkeypatch):
    model = network()
    expected = model(X, T)
    real = fastdiff.acceleration.families.improved_diffusion.apply_norm
    monkeypatch.setattr(
        fastdiff.acceleration.families.improved_diffusion,
        "apply_norm",
        # Right for the small images that blocks are tried on.
        lambda norm, x, **options: real(norm, x, **options) * (1.1 if x.shape[-1] > 4 else 1),
    )
    with pytest.raises(InputError, match="differs by .* more than 0.001; the model was put back"):
        fastdiff.accelerate(model, verify=(X, T))
    assert torch.equal(model(X, T), expected)
    assert not any(isinstance(part, Fused) for part in model.modules())
    with pytest.raises(InputError, match="the inputs of a Network are not known; give verify="):
        fastdiff.accelerate(model, verify=True)


@pytest.mark.parametrize("given", [X, 1, None, (), {"x": X}])
def test_what_is_no_input_to_verify_with(given):
    model = network()
    with pytest.raises(
        InputError, match="expected True, False or a tuple of the model's arguments"
    ):
        fastdiff.accelerate(model, verify=given)
    with pytest.raises(InputError, match="the model answers zeros, which verify nothing"):
        with torch.no_grad():
            for parameter in model.out.parameters():
                parameter.zero_()
        fastdiff.accelerate(model, verify=(X, T))
    assert not any(isinstance(part, Fused) for part in model.modules())


def test_what_looks_like_a_known_class_and_is_none():
    class ResnetBlock2D(nn.Module):
        pass

    class Attend(ResnetBlock2D):
        attn_dropout = None

    attention = nn.MultiheadAttention(8, 2)
    layers = ResnetBlock2D(), Attend(), nn.GroupNorm(2, 4, bias=False), nn.SiLU(), attention

    class AttentionNetwork(nn.Sequential):
        pass

    model = AttentionNetwork(*layers)
    fastdiff.accelerate(model)
    assert not replaced(model)
    (left,) = fastdiff.report(model).left
    assert left.name == "4" and left.how.startswith("no attention block that is known")


def test_bad_input():
    with pytest.raises(InputError, match="model is a function; expected a torch.nn.Module"):
        fastdiff.accelerate(lambda x: x)
    model = network()
    with pytest.raises(InputError, match="dtype is torch.float64; expected torch.bfloat16"):
        fastdiff.accelerate(model, dtype=torch.float64)
    for undo in (fastdiff.restore, fastdiff.report):
        with pytest.raises(InputError, match="this Network is not accelerated"):
            undo(model)
    fastdiff.accelerate(model)
    with pytest.raises(InputError, match="this Network is accelerated; restore it first"):
        fastdiff.accelerate(model)


@pytest.mark.seconds
def test_torch_compile_passes_over_it():
    model = network(film=True)
    expected = model(X, T)
    fastdiff.accelerate(model)
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True, backend="eager")(X, T), expected)


def test_parts_that_are_accelerated_already_stay_so():
    model = network()
    expected = model(X, T)
    fastdiff.accelerate(model.block1)
    fastdiff.accelerate(model.attention1)
    kind = type(model.block1)
    fastdiff.accelerate(model)
    assert not fastdiff.report(model).left
    assert type(model.block1) is kind and "block1" not in replaced(model)
    assert "block1.in_layers.0" not in replaced(model)
    assert_close(model(X, T), expected)
    assert_close(model.block1(torch.ones(2, 16, 8, 8), emb=torch.ones(2, 24)), _block(model))
    fastdiff.restore(model)
    assert type(model.block1) is kind
    with pytest.raises(InputError, match="differs by"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fastdiff.acceleration.families.sequential, "apply_norm", lambda norm, x, **_: 2 * x
        )
        fastdiff.accelerate(model, verify=(X, T))
    assert type(model.block1) is kind
    fastdiff.restore(model.block1)
    fastdiff.restore(model.attention1)
    assert torch.equal(model(X, T), expected)


def _block(model):
    return model.block1(torch.ones(2, 16, 8, 8), torch.ones(2, 24))


@pytest.mark.seconds
def test_torchs_generator_and_a_model_without_memory_are_left_alone():
    before = torch.get_rng_state()
    fastdiff.accelerate(network_on_meta())
    assert torch.equal(torch.get_rng_state(), before)


def network_on_meta():
    with torch.device("meta"):
        return Network()


def test_one_class_for_all_modules_of_a_kind():
    model = nn.Sequential(*(AttentionBlock(32, 2) for _ in range(3)), GroupNorm32(8, 32))
    fastdiff.accelerate(model)
    assert len({type(part) for part in list(model)[:3]}) == 1
    assert replaced(model)["3"] == "norm in the layout of its input"


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("copied", [False, True])
def test_a_class_that_somebody_derived_is_not_lost_by_restore(copied):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.GroupNorm(4, 8))
    fastdiff.accelerate(model)
    model = copy.deepcopy(model) if copied else model
    parametrize.register_parametrization(model[2], "weight", Doubled())
    expected = model(X)
    with pytest.raises(InputError, match="a GroupNorm became a ParametrizedGroupNorm after it was"):
        fastdiff.restore(model)
    assert torch.equal(model(X), expected) and isinstance(model[1], Fused)
    parametrize.remove_parametrizations(model[2], "weight")
    fastdiff.restore(model)
    assert_close(model(X), expected)
    assert not any(isinstance(part, Fused) for part in model.modules())

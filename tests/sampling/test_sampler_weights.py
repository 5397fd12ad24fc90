"""The weights a sampler runs its model with: cast, in another layout, packed for oneDNN."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.sampling.network import packing
from fastdiff.sampling.network.network import Network
from fastdiff.sampling.sampler import Sampler
from sampler_tools import SHAPE, Tiny, diffusion

PROCESS = diffusion(20)


pytestmark = pytest.mark.usefixtures("seeded")


class Tied(nn.Module):
    """A linear layer whose weight an embedding has too, a norm, and convolutions."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 2)
        self.tied = nn.Linear(2, 4, bias=False)
        self.tied.weight = self.embedding.weight
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.out = nn.ConvTranspose2d(4, 2, 3, padding=1)
        self.seen = {}

    def forward(self, x, t):
        self.seen = {name: (p.dtype, p.stride()) for name, p in self.named_parameters()}
        return self.out(self.norm(self.conv(x)))


# --- Weights ----------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["packs", "packs not"])
def packs(request, monkeypatch):
    """Whether bfloat16 convolutions are packed, whatever this CPU can: oneDNN's part is played by
    PyTorch's own convolution."""

    def convolve(x, weight, bias, geometry):
        padding, stride, dilation, groups = geometry
        return nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)

    monkeypatch.setattr(packing, "serves", lambda dtype: request.param)
    monkeypatch.setattr(packing, "_reorder", lambda weight, geometry, shape: weight)
    monkeypatch.setattr(packing, "_convolve", convolve)
    return request.param


def test_what_is_cast_is_what_autocast_would_cast(packs):
    model = Tied().eval()
    live = {name: p.data_ptr() for name, p in model.named_parameters()}
    Sampler(model, PROCESS, steps=2, dtype=torch.bfloat16).sample(SHAPE)
    cast = {name for name, (dtype, _) in model.seen.items() if dtype == torch.bfloat16}
    # The linear layer's copy of the weight, and not the embedding's. A convolution that is packed
    # casts its weight when it packs it, from the float32 one.
    expected = {"conv.weight", "conv.bias", "out.weight", "out.bias", "tied.weight"}
    assert cast == expected - ({"conv.weight"} if packs else set())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == live
    assert model.tied.weight is model.embedding.weight
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_whether_convolutions_are_packed_changes_no_sample(packs):
    """Both give what autocast gives without any copies of weights."""
    model = Tied().eval()
    with torch.autocast("cpu", torch.bfloat16):
        expected = Sampler(model, PROCESS, timesteps=[9]).sample(SHAPE)
    actual = Sampler(model, PROCESS, timesteps=[9], dtype=torch.bfloat16).sample(SHAPE)
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("grad", [True, False])
def test_cast_weights_change_no_result(grad, monkeypatch):
    model = Tied().eval().requires_grad_(grad)
    x, t = torch.randn(SHAPE), torch.zeros(3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x, t)
    monkeypatch.setattr(packing, "serves", lambda dtype: False)
    network = Network(model, torch.bfloat16, channels_last=False, compile=False)
    with network.sampling(), torch.no_grad():
        assert torch.equal(network(x, t, {}), expected)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_channels_last_on_request(dtype):
    model = Tied().eval()
    expected = Sampler(model, PROCESS, timesteps=[9], dtype=dtype).sample((2, 2, 5, 4))
    sampler = Sampler(model, PROCESS, timesteps=[9], dtype=dtype, channels_last=True)
    actual = sampler.sample((2, 2, 5, 4))
    tolerance = 1e-5 if dtype is None else 0.05
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert model.seen["conv.weight"][1][1] == 1 and model.conv.weight.stride()[1] != 1
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_the_model_has_its_own_weights_whenever_somebody_looks():
    model = Tied().eval()
    sampler = Sampler(model, PROCESS, steps=3, dtype=torch.bfloat16, channels_last=True)

    def look(step=None):
        assert all(p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters())

    sampler.sample(SHAPE, callback=look)
    for _ in sampler.iterate(SHAPE):
        look()
    for fail in (RuntimeError, KeyboardInterrupt):

        def break_down(*_, fail=fail):
            raise fail("in the middle")

        hook = model.norm.register_forward_hook(break_down)
        with pytest.raises(fail):
            sampler.sample(SHAPE)
        hook.remove()
        look()
    sampler.sample(SHAPE)


class Timed(nn.Sequential):
    def forward(self, x, t):
        return super().forward(x)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight + 5, self.bias, padding=1)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Standardised(2, 2, 3),
        lambda: nn.utils.spectral_norm(nn.Conv2d(2, 2, 3, padding=1)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3, padding=1)),
    ],
    ids=["standardised", "spectral_norm", "weight_norm"],
)
def test_layers_that_compute_their_weight_are_as_under_autocast(layer, monkeypatch):
    torch.manual_seed(0)
    model = Timed(layer(), nn.Tanh()).eval()
    x, t = torch.randn(SHAPE), torch.zeros(3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x, t)
    monkeypatch.setattr(packing, "serves", lambda dtype: False)
    network = Network(model, torch.bfloat16, channels_last=False, compile=False)
    with network.sampling(), torch.no_grad():
        assert torch.equal(network(x, t, {}), expected)


def test_autograd_keeps_what_hangs_on_the_parameters():
    """DDP's hooks, for one, hang on the node that accumulates a parameter's gradient."""
    model = Tied()

    def nodes():
        return [p.view_as(p).grad_fn.next_functions[0][0] for p in model.parameters()]

    before = nodes()
    Sampler(model, PROCESS, steps=2, dtype=torch.bfloat16, channels_last=True).sample(SHAPE)
    assert all(a is b for a, b in zip(nodes(), before, strict=True))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_call_in_inference_mode_leaves_nothing_behind(dtype):
    model = Tied().eval()
    sampler = Sampler(model, PROCESS, steps=2, dtype=dtype, channels_last=True)
    with torch.inference_mode():
        inside = sampler.sample(SHAPE)
    assert torch.equal(sampler.sample(SHAPE), inside)


def test_what_a_condition_sees_of_the_model():
    model = Tied().eval()

    def denoised_fn(x):
        return x + 0 * model(x, None)  # in float32, outside of the network's autocast

    sampler = Sampler(model, PROCESS, steps=2, dtype=torch.bfloat16, denoised_fn=denoised_fn)
    expected = sampler.sample(SHAPE, callback=lambda step: None)
    assert torch.equal(sampler.sample(SHAPE), expected)


def test_the_callers_autocast_reaches_every_layer():
    model, seen = Tied().eval(), []
    hook = model.conv.register_forward_hook(lambda layer, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        Sampler(model, PROCESS, timesteps=[19]).sample(SHAPE)
    Sampler(model, PROCESS, timesteps=[19]).sample(SHAPE)
    hook.remove()
    assert seen == [torch.bfloat16, torch.float32]


def test_weights_are_cast_once_for_the_whole_loop_and_callbacks_see_no_autocast():
    class Casts(TorchDispatchMode):
        of_weights = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
            self.of_weights += copies and result.shape == model.conv.weight.shape
            return result

    model = Tiny()
    sampler = Sampler(model, diffusion(), steps=5, dtype=torch.bfloat16)
    autocast = []
    with Casts() as casts:
        whole = sampler.sample(
            SHAPE, callback=lambda step: autocast.append(torch.is_autocast_enabled("cpu"))
        )
    assert casts.of_weights == 1
    assert autocast == [False] * 5
    *_, last = sampler.iterate(SHAPE)
    assert torch.equal(whole, last["sample"])


# --- Packed convolutions ----------------------------------------------------------------------


class Convolutions(nn.Module):
    """Strides, groups, no bias, 1x1, a weight that two layers share, padding that is not zeros."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(2, 8, 3, padding=1),
                nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False),
                nn.Conv2d(8, 8, 3, padding=1, groups=4),
                nn.Conv2d(8, 8, 3, padding=2, dilation=2),
                nn.Conv2d(8, 8, 3, padding=2, dilation=2),
                nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
                nn.Conv2d(8, 8, 3, padding="same"),
                nn.Conv2d(8, 2, 1),
            ]
        )
        self.layers[4].weight = self.layers[3].weight

    def forward(self, x, t):
        size = x.shape[2:]
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return nn.functional.interpolate(x, size)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_packed_convolutions_compute_what_plain_ones_do(monkeypatch, channels_last, dtype):
    if not packing.serves(dtype or torch.float32):
        pytest.skip(f"this CPU packs no {dtype} convolutions")
    torch.manual_seed(0)
    model = Convolutions().eval()
    options = {"steps": 3, "channels_last": channels_last, "dtype": dtype}
    packed = Sampler(model, PROCESS, **options)
    shapes = [(3, 2, 8, 8), (2, 2, 8, 8), (2, 2, 10, 6)]
    actual = [packed.sample(shape) for shape in shapes]
    with torch.no_grad():
        model.layers[0].weight.data.mul_(1.5)  # seen by the next call
    actual.append(packed.sample(shapes[0]))
    assert not any("forward" in layer.__dict__ for layer in model.modules())
    monkeypatch.setattr(packing, "serves", lambda dtype: False)
    with torch.no_grad():
        model.layers[0].weight.data.div_(1.5)
    plain = Sampler(model, PROCESS, **options)
    expected = [plain.sample(shape) for shape in shapes]
    with torch.no_grad():
        model.layers[0].weight.data.mul_(1.5)
    expected.append(plain.sample(shapes[0]))
    assert not torch.equal(actual[0], actual[3])
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_each_weight_is_packed_once_a_call(monkeypatch):
    count = []
    reorder = packing._reorder
    monkeypatch.setattr(packing, "_reorder", lambda *args: count.append(1) or reorder(*args))
    model = Convolutions().eval()
    if not packing.serves(torch.float32):
        pytest.skip("this CPU packs no convolutions")
    sampler = Sampler(model, PROCESS, steps=6)
    for run in (sampler.sample, lambda shape: list(sampler.iterate(shape))):
        count.clear()
        run((2, 2, 8, 8))
        assert len(count) == 6  # of eight layers two are none of its own
    model.layers[0].weight.requires_grad_(False)

    def change(step):
        model.layers[0].weight.mul_(1.01)

    count.clear()
    sampler.sample((2, 2, 8, 8), callback=change)
    assert len(count) == 6 + 5  # a change between two steps is seen


def test_without_the_private_operators_nothing_is_packed(monkeypatch):
    def missing(*_):
        raise AttributeError("no such operator")

    monkeypatch.setattr(packing, "_reorder", missing)
    packing.serves.cache_clear()
    try:
        assert not packing.serves(torch.float32)
        model = Convolutions().eval()
        assert torch.isfinite(Sampler(model, PROCESS, steps=2).sample((2, 2, 8, 8))).all()
    finally:
        packing.serves.cache_clear()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_call_inside_another_ones_steps(dtype):
    model = Convolutions().eval()
    options = {"steps": 4, "dtype": dtype, "channels_last": True}
    sampler = Sampler(model, PROCESS, **options)
    expected = Sampler(model, PROCESS, **options).sample((2, 2, 8, 8))
    inner = []
    actual = sampler.sample(
        (2, 2, 8, 8), progress=lambda: inner.append(sampler.sample((2, 2, 8, 8)))
    )
    for samples in (actual, *inner):
        assert torch.equal(samples, expected)
    assert len(inner) == 4
    assert not any("forward" in layer.__dict__ for layer in model.modules())
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters())

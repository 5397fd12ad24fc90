import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastdiff.errors import InputError
from fastdiff.methods.levels import MEAN_TYPES, VAR_TYPES
from fastdiff.methods.registry import METHODS
from fastdiff.methods.table import COLUMNS, StepTable
from fastdiff.models.unet import UNet
from fastdiff.process.variance_exploding import VarianceExploding, geometric_sigmas
from fastdiff.sampling.recommended import recommended
from fastdiff.sampling.sampler import Sampler
from golden_cases import META, array, network, process, relative_error
from sampler_tools import SHAPE, Tiny, closed_form, diffusion, small_unet

# Against the process's own loops

SPACED = [
    *({}, {"steps": 7}, {"steps": "3,4"}, {"steps": "ddim5"}),
    *({"steps": 6, "spacing": name} for name in ("quadratic", "trailing", "logsnr")),
    {"timesteps": [0, 2, 3, 11, 18]},
]
CLIPPED = [(spaced, True) for spaced in SPACED] + [(spaced, False) for spaced in SPACED[:4]]


@pytest.mark.sample(64)
@pytest.mark.parametrize("mean_type", MEAN_TYPES)
@pytest.mark.parametrize("var_type", VAR_TYPES)
@pytest.mark.parametrize("spaced, clip", CLIPPED)
def test_it_samples_as_the_processs_loops_do(mean_type, var_type, spaced, clip):
    original = diffusion(mean_type=mean_type, var_type=var_type, rescale_timesteps=True)
    asked = {"sections" if name == "steps" else name: value for name, value in spaced.items()}
    strided = original.respace(**asked) if spaced else original
    model = closed_form(doubled=original.learns_variance)
    noise, z = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))

    def step_noise(t):
        return z.roll(t)

    for method, eta in (("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7)):
        sampler = Sampler(model, original, method=method, eta=eta, clip_denoised=clip, **spaced)
        actual = list(sampler.iterate(SHAPE, noise=noise, step_noise=step_noise))
        options = {"noise": noise, "step_noise": step_noise, "clip_denoised": clip}
        if method == "ddpm":
            expected = list(strided.p_sample_loop_progressive(model, SHAPE, **options))
        else:
            expected = list(strided.ddim_sample_loop_progressive(model, SHAPE, eta=eta, **options))
        assert len(actual) == len(expected) == strided.num_timesteps
        for ours, theirs in zip(actual, expected, strict=True):
            for name in ("sample", "pred_xstart"):
                # Unclipped, a network that is no denoiser lets samples grow without bound, and its
                # sin(5x) then multiplies every rounding.
                scale = max(1.0, theirs["sample"].abs().max(), theirs["pred_xstart"].abs().max())
                bound = 1e-4 if clip else 3e-4
                assert (ours[name] - theirs[name]).abs().max() <= bound * scale
        last = sampler.sample(SHAPE, noise=noise, step_noise=step_noise)
        assert torch.equal(last, actual[-1]["sample"])


@pytest.mark.parametrize("case", [name for name, meta in META.items() if meta["K"] <= 100])
@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_recorded_loops(case, method):
    strided = process(case)
    x_T, z = array(f"{case}/noise"), array(f"{case}/z")
    sampler = Sampler(network(strided), strided, method=method)
    sample = sampler.sample(tuple(x_T.shape), noise=x_T, step_noise=z)
    name = {"ddpm": "p_sample_loop", "ddim": "ddim_sample_loop"}[method]
    assert relative_error(sample, array(f"{case}/{name}")) <= 1e-4


@pytest.mark.parametrize("method, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7)])
def test_torch_noise_is_drawn_in_the_published_order(method, eta):
    original, model = diffusion(var_type="fixed_large"), closed_form()
    strided = original.respace("6")
    sampler = Sampler(model, original, steps=6, method=method, eta=eta, rng="torch")
    generator = torch.Generator().manual_seed(11)
    if method == "ddpm":
        expected = strided.p_sample_loop(model, SHAPE, generator=generator)
    else:
        expected = strided.ddim_sample_loop(model, SHAPE, eta=eta, generator=generator)
    sample = sampler.sample(SHAPE, seed=11)
    torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-4)
    torch.manual_seed(11)
    draws = [torch.randn(SHAPE) for _ in range(7)]  # x_T, then one for every step
    given = sampler.sample(SHAPE, noise=draws[0], step_noise=lambda t: draws[6 - t])
    assert torch.equal(given, sample)
    assert torch.equal(sampler.sample(SHAPE, seed=11), sample)
    assert not torch.equal(sampler.sample(SHAPE, seed=12), sample)


# Noise and batches


@pytest.mark.parametrize("method, eta", [(method, None) for method in METHODS] + [("ddim", 0.5)])
def test_a_sample_is_the_same_in_any_batch(method, eta):
    sampler = Sampler(closed_form(), diffusion(), steps=5, method=method, eta=eta)
    whole = sampler.sample((5, 2, 4, 4), seed=9, first_sample=100)
    parts = [
        sampler.sample((count, 2, 4, 4), seed=9, first_sample=100 + first)
        for first, count in ((0, 1), (1, 3), (4, 1))
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(sampler.sample((5, 2, 4, 4), seed=9, first_sample=100), whole)
    assert not torch.equal(sampler.sample((5, 2, 4, 4), seed=10, first_sample=100), whole)
    assert len({tuple(x.flatten().tolist()) for x in whole}) == 5


@pytest.mark.parametrize("method", METHODS)
def test_sixty_four_samples_are_the_same_however_they_are_cut(method):
    noise = []

    def model(x, t):
        noise.append(x)
        return torch.tanh(x) * (0.6 + 0.4 * torch.cos(t / 7)).view(-1, 1, 1, 1)

    def drawn(count):
        """All 64 in batches of ``count``: the samples, and what the network was given."""
        noise.clear()
        sampler = Sampler(model, diffusion(), steps=4, method=method)
        parts = [
            sampler.sample((count, 2, 4, 4), seed=7, first_sample=first)
            for first in range(0, 64, count)
        ]
        rows = len(sampler.table)
        inputs = [torch.cat(noise[row::rows]) for row in range(rows)]
        return torch.cat(parts), inputs

    (whole, inputs), *others = (drawn(count) for count in (64, 8, 1))
    for samples, seen in others:
        assert torch.equal(samples, whole)
        assert all(torch.equal(a, b) for a, b in zip(seen, inputs, strict=True))


def test_a_unets_samples_are_the_same_in_any_batch():
    torch.manual_seed(0)
    unet = UNet(
        in_channels=1,
        model_channels=32,
        out_channels=1,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(1, 2),
    )
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.05) if not parameter.any() else None
    sampler = Sampler(unet, diffusion(), steps=3)
    whole = sampler.sample((3, 1, 8, 8), seed=4)
    parts = [sampler.sample((1, 1, 8, 8), seed=4, first_sample=i) for i in range(3)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)


# The network's mode, dtype and layout


@pytest.mark.parametrize("fail", [None, RuntimeError, KeyboardInterrupt])
def test_eval_mode_and_gradients_are_put_back(fail):
    model = Tiny().train()
    model.drop.eval()  # a part the user froze stays frozen

    def callback(step):
        assert torch.is_grad_enabled()
        if fail is not None and step["step"] == 1:
            raise fail

    sampler = Sampler(model, diffusion(), steps=3)
    if fail is None:
        assert not sampler.sample(SHAPE, callback=callback).requires_grad
    else:
        with pytest.raises(fail):
            sampler.sample(SHAPE, callback=callback)
    assert model.training and model.conv.training and not model.drop.training
    assert not any(training for *_, training, _ in model.seen)
    # Nothing of the interrupted run is left in the next.
    assert torch.equal(sampler.sample(SHAPE), Sampler(model, diffusion(), steps=3).sample(SHAPE))


def test_an_abandoned_iteration_leaves_the_mode_as_it_is():
    model = Tiny().train()
    steps = Sampler(model, diffusion(), steps=3).iterate(SHAPE)
    next(steps)
    assert model.training and not any(training for *_, training, _ in model.seen)
    steps.close()
    assert model.training and model.drop.training


def test_autocast_and_parameter_dtypes():
    model = Tiny()
    sample = Sampler(model, diffusion(), steps=3, dtype=torch.bfloat16).sample(SHAPE)
    assert sample.dtype == torch.float32
    assert model.seen[0][:2] == (torch.float32, torch.float32)
    reference = Sampler(model, diffusion(), steps=3).sample(SHAPE)
    assert not torch.equal(sample, reference)  # the network did run in bfloat16
    torch.testing.assert_close(sample, reference, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = Sampler(model, diffusion(), steps=3, dtype=torch.float32).sample(SHAPE)
    assert torch.equal(exact, reference)

    half = Tiny().bfloat16()
    assert Sampler(half, diffusion(), steps=3).sample(SHAPE).dtype == torch.float32
    assert half.seen[0][0] == torch.bfloat16


def test_channels_last_follows_the_model():
    plain = Tiny()
    last = Tiny().to(memory_format=torch.channels_last)
    last.load_state_dict(plain.state_dict())
    shape = (2, 2, 4, 6)
    expected = Sampler(plain, diffusion(), steps=3).sample(shape)
    actual = Sampler(last, diffusion(), steps=3).sample(shape)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    strides = torch.empty(shape).contiguous(memory_format=torch.channels_last).stride()
    assert {seen[-1] for seen in last.seen} == {strides}
    assert {seen[-1] for seen in plain.seen} == {torch.empty(shape).stride()}


def test_a_bound_method_is_a_model():
    model = Tiny().train()
    expected = Sampler(model, diffusion(), steps=3).sample(SHAPE)
    assert torch.equal(Sampler(model.forward, diffusion(), steps=3).sample(SHAPE), expected)
    assert model.training and not model.seen[-1][3]


@pytest.mark.parametrize("shape", [(3, 1), (2, 2, 9), (2, 1, 4, 5), (1, 2, 3, 4, 2)])
def test_data_of_any_dimension(shape):
    for kind in (diffusion(), VarianceExploding(geometric_sigmas(20))):
        sample = Sampler(closed_form(), kind, steps=4).sample(shape)
        assert sample.shape == shape and torch.isfinite(sample).all()


def test_what_iterate_yields():
    rescaled = diffusion(20, rescale_timesteps=True)
    steps = list(Sampler(closed_form(), rescaled, steps=3).iterate(SHAPE))
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert [step["timestep"] for step in steps] == [950.0, 500.0, 0.0]
    assert all(step["sample"].shape == step["pred_xstart"].shape == SHAPE for step in steps)
    assert torch.equal(steps[-1]["sample"], steps[-1]["pred_xstart"])


def test_progress_draws_a_bar(capsys):
    Sampler(closed_form(), diffusion(), steps=3).sample(SHAPE, progress=True)
    assert "0/3" in capsys.readouterr().err
    calls = []
    sampler = Sampler(closed_form(), diffusion(), steps=3)
    sampler.sample(SHAPE, progress=lambda: calls.append(1))
    assert len(calls) == 3


# Variance-exploding processes


def test_variance_exploding_starts_from_its_prior_and_scales_the_networks_input():
    ve = VarianceExploding(geometric_sigmas(20, 0.01, 50.0))
    inputs = []

    def model(x, t):
        inputs.append((x.std().item(), t[0].item()))
        return torch.zeros_like(x)

    Sampler(model, ve, steps=4, method="ddim", clip_denoised=False).sample((500, 2, 4))
    # ε = 0 leaves x as it was, 50·N(0, I), which is scaled by 1/√(1 + σ²) for each level.
    expected = [50 / math.hypot(1, sigma) for sigma in ve.respace(4).sigmas[::-1]]
    assert [std for std, _ in inputs] == pytest.approx(expected, rel=0.03)
    assert [t for _, t in inputs] == [19, 13, 6, 0]


@pytest.mark.parametrize("conditioning", ["timestep", "log_sigma"])
def test_a_unet_samples_a_variance_exploding_process(conditioning):
    torch.manual_seed(0)
    unet = small_unet(1)
    ve = VarianceExploding(geometric_sigmas(20), conditioning=conditioning, mean_type="v")
    losses = ve.training_losses(unet, torch.randn(4, 1, 8, 8), torch.tensor([0, 5, 12, 19]))
    assert torch.isfinite(losses["loss"]).all()
    sample = Sampler(unet, ve, steps=3).sample((2, 1, 8, 8))
    assert sample.shape == (2, 1, 8, 8)


# Guidance


def test_guidance_is_the_combination_of_two_runs_of_the_network():
    model = Tiny().eval()
    y = torch.tensor([0, 2, 1])
    scale = 3.0

    def combined(x, t):
        null = torch.full_like(y, model.null_label)
        conditional, unconditional = model(x, t, y), model(x, t, null)
        return unconditional + scale * (conditional - unconditional)

    guided = Sampler(model, diffusion(), steps=4, guidance_scale=scale)
    expected = Sampler(combined, diffusion(), steps=4).sample(SHAPE)
    actual = guided.sample(SHAPE, model_kwargs={"y": y})
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert model.seen[-1][2] == 6
    named = guided.sample(
        SHAPE, model_kwargs={"y": y}, uncond_kwargs={"y": torch.full_like(y, model.null_label)}
    )
    assert torch.equal(named, actual)
    plain = Sampler(model, diffusion(), steps=4).sample(SHAPE, model_kwargs={"y": y})
    one = Sampler(model, diffusion(), steps=4, guidance_scale=1.0)
    torch.testing.assert_close(
        one.sample(SHAPE, model_kwargs={"y": y}), plain, rtol=1e-4, atol=1e-4
    )


def test_guidance_doubles_what_belongs_to_the_batch_at_any_depth():
    got = {}

    def model(x, t, **kwargs):
        got.update(kwargs)
        return x

    image = torch.randn(3, 1, 4, 4)
    kwargs = {"text": torch.ones(3, 5), "low_res": image, "table": torch.ones(7), "flag": True}
    Sampler(model, diffusion(), steps=2, guidance_scale=2.0).sample(
        SHAPE, model_kwargs=kwargs, uncond_kwargs={"text": torch.zeros(3, 5)}
    )
    assert torch.equal(got["text"], torch.cat([torch.ones(3, 5), torch.zeros(3, 5)]))
    assert torch.equal(got["low_res"], torch.cat([image, image]))
    assert got["table"].shape == (7,) and got["flag"] is True
    Sampler(model, diffusion(), steps=2, guidance_scale=2.0).sample(
        SHAPE,
        model_kwargs={"added": {"text": torch.ones(3, 2), "size": 8}},
        uncond_kwargs={"added": {"text": torch.zeros(3, 2)}},
    )
    assert got["added"]["text"].tolist() == [[1, 1]] * 3 + [[0, 0]] * 3
    assert got["added"]["size"] == 8


def test_the_samplers_device_is_the_callers_choice():
    sampler = Sampler(closed_form(), diffusion(), steps=2, device="cpu")
    assert sampler.sample(SHAPE).device.type == "cpu"


# A table in place of a process


def test_a_table_is_sampled_as_it_is():
    process = diffusion(var_type="learned_range")
    table = StepTable.from_process(process.respace(6))
    sampler = Sampler(closed_form(doubled=True), table)
    expected = Sampler(closed_form(doubled=True), process, steps=6).sample(SHAPE, seed=3)
    assert torch.equal(sampler.sample(SHAPE, seed=3), expected)
    assert sampler.table is table
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in table.packed.tolist()]
    again = StepTable.from_rows(rows, doubled_output=True)
    assert torch.equal(again.packed, table.packed) and again.noisy_rows == table.noisy_rows
    for options in ({"steps": 3}, {"method": "ddim"}, {"clip_denoised": False}, {"eta": 0.5}):
        with pytest.raises(InputError, match="belong to a process"):
            Sampler(closed_form(), table, **options)
    with pytest.raises(InputError, match="a StepTable is no diffusion process"):
        sampler.sample(SHAPE, image=torch.zeros(SHAPE))


def test_rows_that_are_no_table():
    for rows, message in (
        ([], "0 rows"),
        ([{"a": 1.0}], "timesteps is missing"),
        ([{"timesteps": 1.0, "f": 1.0}], "row 0: 'f' is no column"),
        ([{"timesteps": 1.0, "c": "half"}], "rows hold what is no number: .*'half'"),
        ([{"timesteps": float("nan")}], "NaN"),
    ):
        with pytest.raises(InputError, match=message):
            StepTable.from_rows(rows)


def test_self_conditioning_feeds_the_last_x_start_back():
    given = []

    def model(x, t, x_self_cond):
        given.append(x_self_cond.clone())
        return closed_form()(x, t) + 0.1 * x_self_cond

    sampler = Sampler(model, diffusion(), steps=4, self_condition="x_self_cond")
    predicted = [step["pred_xstart"] for step in sampler.iterate(SHAPE)]
    assert not given[0].any()
    assert all(torch.equal(a, b) for a, b in zip(given[1:], predicted[:-1], strict=True))


def test_an_output_may_be_an_object_with_a_sample():
    def model(x, t):
        return SimpleNamespace(sample=closed_form()(x, t))

    expected = Sampler(closed_form(), diffusion(), steps=3).sample(SHAPE)
    assert torch.equal(Sampler(model, diffusion(), steps=3).sample(SHAPE), expected)


# The method that is chosen


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 6},
        {"steps": "40"},
        {"steps": 6, "spacing": "logsnr"},
        {"steps": "3,4"},
        {"timesteps": [0, 7, 99]},
        {},
    ],
)
def test_auto_is_the_recommended_method_with_its_spacing(options):
    process = diffusion(100)
    count = {"40": 40, "3,4": 7, 6: 6}.get(options.get("steps"), 3 if options else 100)
    method, spacing = recommended(count)
    written = dict(options)
    if options.get("steps") in (6, "40"):
        written.setdefault("spacing", spacing)
    sampler = Sampler(closed_form(), process, method="auto", **options)
    expected = Sampler(closed_form(), process, method=method, **written)
    assert sampler.table.method == method and sampler.settings.method == method
    assert torch.equal(sampler.sample(SHAPE, seed=2), expected.sample(SHAPE, seed=2))
    plain = Sampler(closed_form(), diffusion(30, mean_type="previous_x"), method="auto", steps=6)
    assert plain.settings.spacing is None  # such a network knows the process's own steps alone
    sampler.configure(steps=50)  # another number, perhaps another method
    method, spacing = recommended(50)
    assert sampler.table.method == method
    image = torch.zeros(SHAPE)
    again = Sampler(closed_form(), process, method=method, steps=50)
    if "spacing" not in options:
        again.configure(spacing=spacing)
    else:
        again.configure(spacing=options["spacing"])
    given = {"image": image, "strength": 0.5, "seed": 1}
    assert torch.equal(sampler.sample(SHAPE, **given), again.sample(SHAPE, **given))

"""fastdiff convert: published .pt files become checkpoints, or one line says why not."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convert_tools import FLAGS, convert, refused, saved, small
from fastdiff import UNet, cli, load
from fastdiff.checkpoints.published import load_published
from fastdiff.models import presets
from paths import RECORDED

CASES = ["improved_film_learned", "improved_plain_classcond", "guided_updown_neworder"]


def without(flags, *names):
    """The flags, of which some are left out with their values."""
    kept, skip = [], False
    for flag in flags:
        if flag.startswith("--"):
            skip = flag in names
        if not skip:
            kept.append(flag)
    return kept


# --- What is written ---


@pytest.mark.parametrize("case", CASES)
def test_networks_of_the_published_code(folder, case):
    arrays = np.load(RECORDED / f"unet_{case}.npz")
    config = json.loads(str(arrays["config"]))
    state = {k.removeprefix("sd/"): torch.from_numpy(arrays[k]) for k in arrays if "sd/" in k}
    torch.save(state, "model.pt")
    order = "qkv_first" if config.get("use_new_attention_order") else "heads_first"
    flags = ["--attention-order", order, "--image-size", "16"]
    flags += ["--steps", "1000", "--noise-schedule", "cosine"]
    doubled = config["out_channels"] == 2 * config["in_channels"]
    flags.append("--learn-sigma" if doubled else "--no-sigma-small")
    if config.get("num_head_channels", -1) != -1:
        flags += ["--num-head-channels", str(config["num_head_channels"])]
    else:
        flags += ["--num-heads", str(config["num_heads"])]
        flags += ["--num-heads-upsample", str(config.get("num_heads_upsample", -1))]
    assert convert(*flags, model="model.pt") == 0

    found = load("out")
    inputs = {name: torch.from_numpy(arrays[name]) for name in ("x", "t", "y") if name in arrays}
    out = found.model(inputs["x"], inputs["t"], *([inputs["y"]] if "y" in inputs else []))
    torch.testing.assert_close(out, torch.from_numpy(arrays["out"]), atol=1e-4, rtol=1e-4)
    right = load_published("model.pt", **{k: v for k, v in config.items() if k != "image_size"})
    assert torch.equal(out, right(*inputs.values()))
    assert found.step is None and found.weights == "model"
    assert found.info["image_size"] == 16 and found.diffusion.num_timesteps == 1000


@st.composite
def networks(draw):
    """Arguments of UNet, with the flags for what no shape shows."""
    heads = draw(st.sampled_from([1, 2, 4]))
    order = draw(st.booleans())
    config = {
        "out_channels": draw(st.sampled_from([1, 2])),
        "attention_resolutions": draw(st.sampled_from([[], [1], [2], [1, 2]])),
        "channel_mult": draw(st.sampled_from([[1], [1, 2], [2, 1, 1]])),
        "num_classes": draw(st.sampled_from([None, 3])),
        "conv_resample": draw(st.booleans()),
        "resblock_updown": draw(st.booleans()),
        "use_scale_shift_norm": draw(st.booleans()),
        "use_new_attention_order": order,
    }
    levels = len(config["channel_mult"])
    config["attention_resolutions"] = [
        ds for ds in config["attention_resolutions"] if ds < 2**levels
    ]
    flags = ["--image-size", "8", "--steps", "1000", "--noise-schedule", "linear"]
    flags.append("--learn-sigma" if config["out_channels"] == 2 else "--sigma-small")
    if draw(st.booleans()):
        config |= {"num_heads": heads, "num_head_channels": -1}
        flags += ["--num-heads", str(heads)]
    else:
        config |= {"num_heads": 1, "num_head_channels": 8 // heads}
        flags += ["--num-head-channels", str(8 // heads)]
    flags += ["--attention-order", "qkv_first" if order else "heads_first"]
    return config, flags


@pytest.mark.seconds
@settings(max_examples=25, deadline=None)
@given(networks())
def test_any_network_comes_back_with_its_outputs(tmp_path_factory, drawn):
    config, flags = drawn
    folder = tmp_path_factory.mktemp("convert")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model = small(**config)
        saved(model)
        assert convert(*flags) == 0
        found = load("out").model
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    y = None if config["num_classes"] is None else torch.tensor([2, 0])
    assert torch.equal(found(x, t, y), model(x, t, y))


@pytest.mark.seconds
def test_averages_and_step(folder, capsys):
    models = [small(seed) for seed in range(3)]
    saved(models[0])
    names = [saved(models[1], "ema_0.9999_000100.pt"), saved(models[2], "ema_0.99_000100.pt")]
    assert convert(*FLAGS, *(part for name in names for part in ("--ema", name))) == 0
    shown = capsys.readouterr().out
    assert "prediction epsilon" in shown
    assert "model, EMA 0.9999, EMA 0.99, of step 100" in shown
    assert "steps 1000" in shown and "num_heads 2" in shown
    for weights, model in zip(("model", 0.9999, 0.99), models, strict=True):
        found = load("out", weights=weights)
        assert found.step == 100
        for name, tensor in model.state_dict().items():
            assert torch.equal(found.model.state_dict()[name], tensor)


@pytest.mark.seconds
def test_a_rate_can_be_given(folder):
    saved(small())
    saved(small(1), "average.pt")
    assert convert(*FLAGS, "--ema", "average.pt", "--ema-rate", "0.999") == 0
    # By the step in the model's name it is young: what is sampled are the weights themselves.
    assert load("out").weights == "model" and load("out").ema_rates == ["0.999"]


@pytest.mark.seconds
def test_a_preset_says_the_rest(folder):
    model = UNet.from_preset("digits", image_size=8).eval()
    saved(model)
    assert convert("--preset", "digits") == 0
    found = load("out")
    assert found.model.config == model.config
    assert found.diffusion.rescale_timesteps and found.diffusion.var_type == "learned_range"
    assert convert("--preset", "digits", "--steps", "500", "--dropout", "0.1", "--out", "b") == 0
    found = load("b")
    assert found.diffusion.num_timesteps == 500 and found.model.config["dropout"] == 0.1


def test_what_was_converted_samples(folder):
    model = UNet.from_preset("digits").eval()
    saved(model)
    assert convert("--preset", "digits") == 0
    flags = ["--num", "2", "--steps", "3", "--no-pngs", "--out", "samples", "--device", "cpu"]
    assert cli.main(["sample", "--checkpoint", "out", *flags]) == 0
    assert list(Path("samples").glob("samples_2x8x8x1.npz"))


@pytest.mark.parametrize(
    ("flags", "var_type", "loss_type"),
    [
        (["--no-sigma-small"], "fixed_large", "mse"),
        (["--sigma-small", "--use-kl"], "fixed_small", "rescaled_kl"),
    ],
)
def test_the_flags_of_the_published_scripts(folder, flags, var_type, loss_type):
    saved(small(out_channels=1))
    flags = [*without(FLAGS, "--learn-sigma"), *flags, "--predict-xstart"]
    assert convert(*flags) == 0
    diffusion = load("out").diffusion
    assert (diffusion.var_type, diffusion.loss_type) == (var_type, loss_type)
    assert diffusion.mean_type == "x_start"


def test_super_resolution_where_the_shapes_fit_both(folder, capsys):
    model = small(in_channels=1, out_channels=2, super_res=True)
    saved(model)
    message = refused(capsys, *FLAGS)
    assert "takes 2 channels and answers 2: say whether half" in message
    message = refused(capsys, *FLAGS, "--super-res")
    assert "give --upsample-from" in message
    assert convert(*FLAGS, "--super-res", "--upsample-from", "2") == 0
    found = load("out")
    assert found.model.config["super_res"] is True and found.model.in_channels == 1
    assert found.info["upsample_from"] == 2  # by which fastdiff sample knows its small images


def test_a_preset_says_that_a_network_is_an_upsampler(folder, monkeypatch):
    """Its channels, 3 more of the small image and twice 3 of the answer, fit both readings."""
    model = small(in_channels=3, out_channels=6, super_res=True)
    arguments = {**model.config, "image_size": 8}
    preset = dataclasses.replace(presets.get("adm-64-256"), model=arguments)
    monkeypatch.setitem(presets.PRESETS, "adm-64-256", preset)
    saved(model)
    assert convert("--preset", "adm-64-256") == 0
    assert load("out").model.super_res and load("out").info["upsample_from"] == 64


# --- Where in a file the network lies ---


# --- What is asked for ---


@pytest.mark.parametrize(
    "flag", ["--num-heads", "--attention-order", "--image-size", "--steps", "--noise-schedule"]
)
def test_what_the_shapes_do_not_show_is_asked_for(folder, capsys, flag):
    saved(small())
    message = refused(capsys, *without(FLAGS, flag))
    assert f"give {flag}" in message and "--preset" in message


def test_all_that_is_missing_is_said_at_once(folder, capsys):
    saved(small())
    message = refused(capsys)
    for flag in ("--image-size", "--num-heads or --num-head-channels", "--attention-order"):
        assert flag in message
    for flag in ("--steps", "--noise-schedule", "--learn-sigma", "--rescale-timesteps"):
        assert flag in message


def test_the_variance_is_asked_for(folder, capsys):
    saved(small())
    assert "give --learn-sigma;" in refused(capsys, *without(FLAGS, "--learn-sigma"))
    saved(small(out_channels=1))
    message = refused(capsys, *without(FLAGS, "--learn-sigma"))
    assert "give --sigma-small or --no-sigma-small;" in message


def test_rescaling_is_asked_for_where_it_matters(folder, capsys):
    saved(small())
    flags = [*without(FLAGS, "--steps"), "--steps", "4000"]
    assert "give --rescale-timesteps or --no-rescale-timesteps;" in refused(capsys, *flags)
    assert convert(*flags, "--rescale-timesteps") == 0
    assert load("out").diffusion.rescale_timesteps


def test_with_one_head_the_orders_are_the_same(folder):
    saved(small(num_heads=1))
    flags = [*without(FLAGS, "--attention-order", "--num-heads"), "--num-heads", "1"]
    assert convert(*flags) == 0


def test_one_wide_head_in_every_block_is_one_head(folder, capsys):
    saved(small(num_heads=1, num_head_channels=16))  # the blocks are 16 channels wide
    flags = without(FLAGS, "--attention-order", "--num-heads")
    assert convert(*flags, "--num-head-channels", "16") == 0
    message = refused(capsys, *flags, "--num-head-channels", "8", "--out", "other")
    assert "give --attention-order" in message


# --- What is refused ---


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([*FLAGS, "--no-learn-sigma"], "--no-learn-sigma does not fit .* 1 channels in and 2 out"),
        ([*without(FLAGS, "--num-heads"), "--num-heads", "3"], "3 heads"),
        ([*without(FLAGS, "--noise-schedule"), "--noise-schedule", "steep"], "steep"),
        ([*without(FLAGS, "--steps"), "--steps", "0", "--rescale-timesteps"], "0"),
        ([*FLAGS, "--super-res"], "super_res=True, but the network takes 1 channels"),
        ([*FLAGS, "--upsample-from", "4"], "--upsample-from 4: .* is no super-resolution network"),
        (
            ["--preset", "digits"],
            "is not a network of preset digits: its model_channels is 8, the preset's 32",
        ),
        (["--preset", "resnet"], "no preset named 'resnet'"),
        ([*FLAGS, "--ema", "average.pt"], "average.pt is not called ema_RATE_STEP.pt"),
        ([*FLAGS, "--ema-rate", "0.9"], "1 --ema-rate for 0 --ema"),
        ([*FLAGS, "--ema", "a.pt", "--ema-rate", "2"], "expected 0 < rate < 1"),
        ([*FLAGS, "--ema", "ema_0.9_000200.pt"], "are of different steps"),
        ([*FLAGS, "--ema", "ema_0.9_000100.pt", "--ema", "ema_0.90_000100.pt"], "one rate"),
        ([*FLAGS, "--ema", "ema_0.9_000100.pt"], "ema_0.9_000100.pt: there is no such file"),
    ],
)
def test_wrong_flags(folder, capsys, flags, words):
    saved(small())
    assert re.search(words, refused(capsys, *flags))


def test_flags_that_exclude_each_other(folder):
    with pytest.raises(SystemExit) as stop:
        convert(*FLAGS, "--num-head-channels", "8")
    assert stop.value.code == 2


def test_missing_and_surplus_keys(folder, capsys):
    state = small().state_dict()
    torch.save({k: v for k, v in state.items() if "proj_out.bias" not in k}, "short.pt")
    message = refused(capsys, *FLAGS, model="short.pt")
    assert "short.pt" in message and "missing, such as" in message
    torch.save(state | {"extra.weight": torch.zeros(1)}, "long.pt")
    assert "1 unexpected, such as extra.weight" in refused(capsys, *FLAGS, model="long.pt")
    no_middle = {k: v for k, v in state.items() if not k.startswith("middle_block")}
    torch.save(no_middle, "no_middle.pt")
    message = refused(capsys, *FLAGS, model="no_middle.pt")
    assert "no_middle.pt: not the state dict of an improved-diffusion" in message
    no_way_up = {k: v for k, v in state.items() if not k.startswith("output_blocks")}
    torch.save(no_way_up, "classifier.pt")
    message = refused(capsys, *FLAGS, model="classifier.pt")
    assert "classifier.pt is a classifier's, whose weights do not show everything" in message


def test_an_average_of_another_network(folder, capsys):
    saved(small())
    saved(small(num_classes=3), "ema_0.9_000100.pt")
    message = refused(capsys, *FLAGS, "--ema", "ema_0.9_000100.pt")
    assert "ema_0.9_000100.pt holds the weights of another network" in message


def test_a_directory_in_use(folder, capsys):
    saved(small())
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    assert "--out out is not empty" in refused(capsys, *FLAGS)
    assert [path.name for path in Path("out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("flag", ["--image-size", "--num-heads", "--steps"])
def test_numbers_that_are_none(folder, capsys, flag):
    saved(small())
    flags = without(FLAGS, flag)
    assert f"{flag} is 0; expected at least 1" in refused(capsys, *flags, flag, "0")

"""Which network a published state dict belongs to, found from its names and shapes."""

import json

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from extent import examples
from fastdiff import UNet
from fastdiff.checkpoints.published import unet_config_from_state
from fastdiff.errors import InputError
from fastdiff.models import presets
from paths import RECORDED


def shapes(**config):
    """A U-Net's configuration, and its state dict without values."""
    with torch.device("meta"):
        model = UNet(**config)
    return model.config, model.state_dict()


@st.composite
def configs(draw):
    levels = draw(st.integers(1, 4))
    factors = [2**level for level in range(levels)]
    channels = draw(st.integers(1, 4))
    return {
        "in_channels": channels,
        "model_channels": draw(st.sampled_from([8, 12, 20, 32])),
        "out_channels": draw(st.sampled_from([channels, 2 * channels])),
        "num_res_blocks": draw(st.integers(1, 3)),
        "attention_resolutions": draw(st.lists(st.sampled_from(factors), unique=True)),
        "channel_mult": draw(
            st.lists(
                st.sampled_from([1, 2, 3, 0.5, 1.5, 1.25, 0.7, 2.3]),
                min_size=levels,
                max_size=levels,
            )
        ),
        "conv_resample": draw(st.booleans()),
        "dims": draw(st.sampled_from([1, 2, 3])),
        "num_classes": draw(st.none() | st.integers(1, 10)),
        "use_scale_shift_norm": draw(st.booleans()),
        "resblock_updown": draw(st.booleans()),
        "super_res": draw(st.booleans()),
    }


@pytest.mark.seconds
@settings(max_examples=examples(15, of=60), deadline=None)
@given(configs())
def test_the_configuration_comes_back(arguments):
    config, state = shapes(**arguments)
    shown = unet_config_from_state(state, super_res=arguments["super_res"])
    # The same shapes again, whatever the multipliers are called.
    again, state_again = shapes(**shown)
    assert {name: t.shape for name, t in state_again.items()} == {
        name: t.shape for name, t in state.items()
    }
    widths = [int(m * config["model_channels"]) for m in config.pop("channel_mult")]
    assert widths == [int(m * config["model_channels"]) for m in again["channel_mult"]]
    if config["resblock_updown"] or len(widths) == 1:  # no trace
        config["conv_resample"] = True
    if len(widths) == 1:
        config["resblock_updown"] = False
    assert {name: shown[name] for name in shown if name != "channel_mult"} == {
        name: config[name] for name in shown if name != "channel_mult"
    }


@pytest.mark.seconds
@settings(max_examples=20, deadline=None)
@given(configs())
def test_super_resolution_is_seen_where_one_reading_fits(arguments):
    channels = arguments["in_channels"] * (1 + arguments["super_res"])
    fits_both = channels % 2 == 0 and arguments["out_channels"] == channels
    _, state = shapes(**arguments)
    if not fits_both:
        assert unet_config_from_state(state)["super_res"] == arguments["super_res"]
        with pytest.raises(InputError, match=f"super_res={not arguments['super_res']}, but"):
            unet_config_from_state(state, super_res=not arguments["super_res"])
        return
    with pytest.raises(InputError, match=r"takes \d+ channels .* say whether half"):
        unet_config_from_state(state)
    other = unet_config_from_state(state, super_res=not arguments["super_res"])
    assert {k: t.shape for k, t in shapes(**other)[1].items()} == {
        k: t.shape for k, t in state.items()
    }


@pytest.mark.parametrize("name", presets.names("UNet"))
def test_presets(name):
    config, state = shapes(**presets.get(name).model)
    shown = unet_config_from_state(state, super_res=config["super_res"])
    assert shown == {key: config[key] for key in shown}


@pytest.mark.parametrize("path", sorted(RECORDED.glob("unet_*.npz")), ids=lambda path: path.stem)
def test_recorded_networks_of_the_published_code(path):
    arrays = np.load(path)
    state = {k.removeprefix("sd/"): torch.from_numpy(arrays[k]) for k in arrays if "sd/" in k}
    config = json.loads(str(arrays["config"]))
    shown = unet_config_from_state(state)
    for name in shown.keys() & config.keys():
        expected = config[name]
        expected = sorted(expected) if name == "attention_resolutions" else expected
        expected = list(expected) if isinstance(expected, tuple) else expected
        assert shown[name] == expected, name


TINY = {"in_channels": 1, "model_channels": 8, "out_channels": 1, "num_res_blocks": 2}
TINY |= {"attention_resolutions": [2], "channel_mult": [1, 2]}


def test_what_is_no_such_state_dict():
    _, state = shapes(**TINY)
    wrong = {
        "no time_embed.0.weight": {k: v for k, v in state.items() if "time_embed" not in k},
        "no middle_block.1.qkv.weight": {"conv.weight": torch.zeros(1)},
        "no out.2.weight": {k: v for k, v in state.items() if not k.startswith("out")},
        "it has no input_blocks.0.0.weight": {
            k: v for k, v in state.items() if "input_blocks.0" not in k
        },
        "5 output blocks": {k: v for k, v in state.items() if "output_blocks.5" not in k},
        "time_embed.0.weight is ()": state | {"time_embed.0.weight": torch.zeros(())},
    }
    for words, broken in wrong.items():
        with pytest.raises(InputError) as error:
            unet_config_from_state(broken)
        assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.seconds
@settings(max_examples=examples(30, of=100), deadline=None)
@given(st.data())
def test_broken_state_dicts_raise_one_error_only(data):
    """Whatever is missing, renamed or misshapen: InputError, or a network to compare with."""
    _, state = shapes(**TINY)
    names = sorted(state)
    for name in data.draw(st.lists(st.sampled_from(names), max_size=4)):
        state.pop(name, None)
    for name in data.draw(st.lists(st.sampled_from(names), max_size=3)):
        sizes = data.draw(st.lists(st.integers(0, 5), max_size=4))
        state[name] = torch.empty(sizes, device="meta")
    assume(state)
    try:
        shown = unet_config_from_state(state)
        shapes(**shown)
    except InputError as error:
        assert "\n" not in str(error)

"""Directories of diffusers networks: what they may look like, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fastdiff
from diffusers_format_tools import TINY, assert_same_output, assert_same_weights, randomized, theirs
from fastdiff import UNet
from fastdiff.checkpoints.diffusers_unet import load_unet, save_unet
from fastdiff.errors import InputError
from fastdiff.models.readers.diffusers.config import BOOKKEEPING, FIELDS, unet_arguments
from json_values import json_values

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


@pytest.fixture
def saved(tmp_path):
    """(a directory of diffusers, the network in it)."""
    model = theirs({**TINY, "num_class_embeds": 3})
    model.save_pretrained(tmp_path / "network")
    return tmp_path / "network", model


def test_a_checkpoint_like_any_other(saved):
    path, model = saved
    loaded = fastdiff.load(str(path), weights="model")
    assert loaded.path == path and loaded.model.image_size == 8
    assert (loaded.diffusion, loaded.step, loaded.info, loaded.ema_rates) == (None, None, {}, [])
    again = fastdiff.load(fastdiff.save(path.parent / "ours", loaded.model))
    assert again.config == loaded.config
    assert_same_weights(again.model, loaded.model)
    with pytest.raises(InputError, match="has no weights '0.9999'; there are model"):
        fastdiff.load(path, weights=0.9999)


def test_a_pipeline(tmp_path):
    model = theirs(TINY)
    DDPMPipeline(model, DDPMScheduler()).save_pretrained(tmp_path)
    loaded = fastdiff.load(tmp_path)
    assert loaded.path == tmp_path
    assert_same_output(loaded.model, model)


@pytest.mark.parametrize("variant", [None, "fp16", "bf16"])
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_shards_and_variants(tmp_path, shard, variant):
    dtype = {None: torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    model = theirs(TINY).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard, variant=variant)
    assert (len(list(tmp_path.iterdir())) > 3) == (shard == "20KB")
    loaded = fastdiff.load(tmp_path).model
    assert next(loaded.parameters()).dtype == torch.float32
    assert_same_output(loaded, model.float())


def test_full_precision_is_taken_before_a_variant(saved):
    path, model = saved
    model.half().save_pretrained(path, variant="fp16")
    expected = theirs({**TINY, "num_class_embeds": 3})
    assert (path / "diffusion_pytorch_model.fp16.safetensors").exists()
    assert_same_output(fastdiff.load(path).model, expected)


def test_old_names_of_attention(saved):
    path, model = saved
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = {}
    for name, tensor in model.state_dict().items():
        for new, early in old.items():
            name = name.replace(new, early)
        state[name] = tensor
    assert state.keys() != model.state_dict().keys()
    safetensors.torch.save_file(state, path / WEIGHTS)
    edit_config(path, down_block_types=["UNetResDownBlock2D", "UNetResAttnDownBlock2D"])
    assert_same_output(fastdiff.load(path).model, model)


def test_fields_that_are_left_out_have_their_defaults(saved):
    path, _ = saved
    model = theirs({**TINY, "attention_head_dim": 8, "norm_eps": 1e-5})
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name in (*TINY, "_class_name")}
    (path / "config.json").write_text(json.dumps(kept))
    assert_same_output(fastdiff.load(path).model, model)


def test_checkpoints_from_before_these_arguments_still_load(tmp_path):
    model = randomized(UNet(3, 8, 3, 1, (2,), channel_mult=(1, 2)))
    path = fastdiff.save(tmp_path / "ours", model)
    config = json.loads((path / "config.json").read_text())
    new = ("norm_num_groups", "norm_eps", "flip_sin_to_cos", "freq_shift", "downsample_padding")
    for name in new:
        del config["model"][name]
    (path / "config.json").write_text(json.dumps(config))
    assert_same_output(fastdiff.load(path).model, model)


def test_saving_again_replaces_and_other_files_are_kept(tmp_path):
    first, second = (randomized(UNet(**unet_arguments(TINY)), seed) for seed in (1, 2))
    path = save_unet(tmp_path / "network", first)
    save_unet(path, second)
    assert_same_weights(load_unet(path), second)
    (path / "README.md").write_text("a model card")
    with pytest.raises(InputError, match="it holds other files"):
        save_unet(path, first)
    assert_same_weights(load_unet(path), second)
    assert [entry.name for entry in tmp_path.iterdir()] == ["network"]


def test_an_average_of_the_training_script(tmp_path):
    """unet_ema/ holds EMAModel's own state among the network's fields."""
    average, model = theirs(TINY, seed=1), theirs(TINY, seed=2)
    ema = EMAModel(
        average.parameters(),
        decay=0.9999,
        use_ema_warmup=True,
        inv_gamma=1.0,
        power=0.75,
        model_cls=UNet2DModel,
        model_config=average.config,
    )
    ema.step(average.parameters())
    ema.save_pretrained(tmp_path / "unet_ema")
    DDPMPipeline(model, DDPMScheduler()).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "unet_ema" / "config.json").read_text())
    assert fields["optimization_step"] == 1 and "decay" in fields  # or nothing is tested here
    loaded = fastdiff.load(tmp_path / "unet_ema")
    assert_same_output(loaded.model, average)
    assert loaded.weights == "model" and loaded.diffusion is None
    assert_same_output(fastdiff.load(tmp_path).model, model)  # the pipeline's own


@pytest.mark.seconds
@pytest.mark.sample(5)
@pytest.mark.parametrize("field", sorted(BOOKKEEPING) + ["_name_or_path", "_use_default_values"])
def test_fields_that_change_nothing_are_passed_over(saved, field):
    path, model = saved
    expected = fastdiff.load(path).model
    for value in (0.9999, True, 7, "float16", ["sample_size"]):
        edit_config(path, **{field: value})
        assert_same_weights(fastdiff.load(path).model, expected)


# What cannot be


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def refused(path: Path, *words: object) -> None:
    with pytest.raises(InputError) as caught:
        fastdiff.load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert all(str(word) in message for word in words), message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("down_block_types", ["DownBlock2D", "SkipDownBlock2D"]),
        ("down_block_types", ["DownBlock2D"]),
        ("up_block_types", ["CrossAttnUpBlock2D", "UpBlock2D"]),
        ("up_block_types", ["UpBlock2D", "AttnUpBlock2D"]),
        ("up_block_types", ["ResnetUpsampleBlock2D", "UpBlock2D"]),
        ("mid_block_type", None),
        ("mid_block_scale_factor", 2**0.5),
        ("time_embedding_type", "fourier"),
        ("time_embedding_dim", 64),
        ("center_input_sample", True),
        ("act_fn", "gelu"),
        ("add_attention", False),
        ("class_embed_type", "timestep"),
        ("resnet_time_scale_shift", "spatial"),
        ("resnet_time_scale_shift", "scale_shift"),  # without attn_norm_num_groups
        ("attn_norm_num_groups", 2),
        ("norm_num_groups", 16),
        ("norm_num_groups", None),
        ("attention_head_dim", 3),
        ("attention_head_dim", 0),
        ("downsample_type", "fir"),
        ("upsample_type", "resnet"),
        ("downsample_padding", 2),
        ("freq_shift", 4),
        ("norm_eps", 0),
        ("block_out_channels", []),
        ("block_out_channels", 8),
        ("in_channels", 0),
        ("a_new_field", True),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("cross_attention_dim", 768),
        ("Decay", 0.9),
    ],
)
def test_configs_that_fastdiff_cannot_follow(saved, field, value):
    path, _ = saved
    if field == "upsample_type":  # only where a block asks for it
        edit_config(path, down_block_types=["AttnDownBlock2D"] * 2)
        edit_config(path, up_block_types=["AttnUpBlock2D"] * 2)
    edit_config(path, **{field: value})
    named = "attn_norm_num_groups" if value == "scale_shift" else field
    refused(path, "config.json", named)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("dims", {"dims": 1}),
        ("dims", {"dims": 3}),
        ("super_res", {"super_res": True}),
        ("null_class", {"num_classes": 3, "null_class": True}),
        ("channel_mult", {"channel_mult": (2, 4)}),
        ("conv_resample", {"conv_resample": False}),
        ("norm_num_groups", {"norm_num_groups": 16}),
        ("num_heads", {"num_heads": 2}),
        ("num_heads_upsample", {"num_heads_upsample": 2}),
    ],
)
def test_networks_that_diffusers_cannot_follow(tmp_path, argument, changes):
    plain_heads = {"num_head_channels": -1, "attention_resolutions": (1, 2)}
    model = UNet(**{**unet_arguments(TINY), **plain_heads, **changes})
    with pytest.raises(InputError) as caught:
        save_unet(tmp_path / "network", model)
    message = str(caught.value)
    assert f"{argument}={model.config[argument]!r}" in message and "\n" not in message
    assert not list(tmp_path.iterdir())


def test_something_else_than_a_unet_is_not_saved(tmp_path):
    with pytest.raises(InputError, match="cannot save a Linear; pass the UNet itself"):
        save_unet(tmp_path / "network", torch.nn.Linear(2, 2))
    assert not list(tmp_path.iterdir())


def test_other_classes(saved):
    path, _ = saved
    edit_config(path, _class_name="UNet2DConditionModel")
    refused(path, "config.json", "UNet2DConditionModel", "fastdiff reads UNet2DModel")


def test_load_unet_of_something_else(tmp_path):
    ours = fastdiff.save(tmp_path / "ours", UNet(**unet_arguments(TINY)))
    for path in (tmp_path, tmp_path / "nothing", ours):
        with pytest.raises(InputError, match="is not a diffusers network"):
            load_unet(path)


# Damage


def test_weights_of_another_network(saved):
    path, model = saved
    state = model.state_dict()

    def write(changed):
        safetensors.torch.save_file(changed, path / WEIGHTS)

    key = "mid_block.attentions.0.to_k.weight"
    write({name: tensor for name, tensor in state.items() if name != key})
    refused(path, WEIGHTS, "1 missing", key)
    write({**state, "conv_skip.weight": torch.zeros(1)})
    refused(path, WEIGHTS, "1 unexpected", "conv_skip.weight")
    write({**state, key: torch.zeros(16, 8)})
    refused(path, WEIGHTS, key, (16, 8), (16, 16))


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_truncated_weights(saved, keep):
    path, _ = saved
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:keep])
    refused(path, WEIGHTS, "damaged")


def test_no_weights(saved):
    path, _ = saved
    (path / WEIGHTS).unlink()
    refused(path, f"has no {WEIGHTS}")
    (path / "diffusion_pytorch_model.bin").touch()
    refused(path, "a diffusion_pytorch_model.bin; let diffusers save it again")


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_pytorch_model.fp16.bin",
        "diffusion_pytorch_model.non_ema.safetensors",
        "diffusion_pytorch_model.bin.index.json",
        "diffusion_flax_model.msgpack",
    ],
)
def test_weights_in_other_files(saved, name):
    path, _ = saved
    (path / WEIGHTS).rename(path / name)
    refused(path, f"has no {WEIGHTS} but a {name}; let diffusers save it again")


def test_shards_that_are_not_there(tmp_path):
    theirs(TINY).save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / INDEX).read_text())
    lost = index["weight_map"]["conv_out.bias"]
    (tmp_path / lost).unlink()
    refused(tmp_path, lost, "is missing")
    for bad in ({}, [], {"weight_map": {}}, {"weight_map": {"a": ["b"]}}):
        (tmp_path / INDEX).write_text(json.dumps(bad))
        refused(tmp_path, INDEX, "has no weight_map")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": f"../{WEIGHTS}"}}))
    refused(tmp_path, INDEX, "has no weight_map")


@pytest.mark.seconds
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(field=st.sampled_from(["_class_name", *FIELDS]), value=json_values(40))
@example(field="in_channels", value=10**18)
@example(field="block_out_channels", value=[8, 16.0])
@example(field="block_out_channels", value=[True, 8])
@example(field="sample_size", value=8.5)
def test_any_value_in_config_json_loads_or_names_the_file(saved, field, value):
    path, _ = saved
    original = (path / "config.json").read_text()
    edit_config(path, **{field: value})
    try:
        assert isinstance(fastdiff.load(path), fastdiff.Checkpoint)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    finally:
        (path / "config.json").write_text(original)


@pytest.mark.seconds
def test_diffusers_is_not_needed(saved):
    path, _ = saved
    script = (
        "import sys; sys.modules['diffusers'] = None; import fastdiff;"
        "from fastdiff.checkpoints.diffusers_unet import save_unet;"
        f"save_unet({str(path.parent / 'again')!r}, fastdiff.load({str(path)!r}).model)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert_same_weights(load_unet(path.parent / "again"), load_unet(path))

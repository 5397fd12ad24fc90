"""load reads a pipeline's process from its scheduler's config, as diffusers itself computes it."""

import json

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff.checkpoints.diffusers_scheduler import (
    CLASSES,
    DEFAULTS,
    MEAN_TYPES,
    VAR_TYPES,
    process_of_scheduler,
)
from fastdiff.cli import main
from fastdiff.errors import InputError

UNET = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (32,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


def config_of(scheduler) -> dict:
    return json.loads(scheduler.to_json_string())


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(CLASSES),
    steps=st.integers(2, 1000),
    ends=st.tuples(st.floats(1e-5, 1e-3), st.floats(2e-3, 0.05)),
    schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]),
    prediction=st.sampled_from(sorted(MEAN_TYPES)),
    trained=st.booleans(),
)
def test_betas_are_those_of_the_scheduler(kind, steps, ends, schedule, prediction, trained):
    betas = np.linspace(*ends, steps).tolist() if trained else None
    try:
        scheduler = getattr(diffusers, kind)(
            num_train_timesteps=steps,
            beta_start=ends[0],
            beta_end=ends[1],
            beta_schedule=schedule,
            trained_betas=betas,
            prediction_type=prediction,
        )
    except NotImplementedError:  # few schedulers have the sigmoid
        assert schedule == "sigmoid"
        return
    process = process_of_scheduler(config_of(scheduler))
    assert process.mean_type == MEAN_TYPES[prediction]
    np.testing.assert_allclose(process.betas, scheduler.betas, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
        process.alphas_cumprod, np.cumprod(1 - scheduler.betas.double().numpy()), atol=1e-5
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_fields_that_are_left_out_have_the_schedulers_defaults(kind):
    config = dict(getattr(diffusers, kind)().config)
    for name, value in DEFAULTS.items():
        assert config.get(name, value) == value, name
    assert config.get("variance_type") in (None, "fixed_small")
    process = process_of_scheduler({"_class_name": kind})
    assert (process.var_type, process.mean_type) == ("fixed_small", "epsilon")
    assert len(process.betas) == 1000


@pytest.mark.parametrize("given", [name for name in VAR_TYPES if name])
def test_variances(given):
    scheduler = diffusers.DDPMScheduler(variance_type=given, clip_sample=False)
    process = process_of_scheduler(config_of(scheduler))
    x, learned = torch.ones(1, 1, 2), torch.full((1, 1, 2), 0.3)

    def model(x, t):
        return torch.cat([x, learned], dim=1) if process.learns_variance else x

    for t in (999, 500, 3):
        expected = scheduler._get_variance(t, predicted_variance=learned)
        if given in ("fixed_small_log", "learned_range"):  # its standard deviation, its logarithm
            expected = expected**2 if given == "fixed_small_log" else expected.exp()
        found = process.p_mean_variance(model, x, torch.tensor([t]))["variance"]
        torch.testing.assert_close(found, expected.expand(found.shape), rtol=1e-3, atol=0)


def test_zero_terminal_snr():
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler = diffusers.DDPMScheduler(**options)
    process = process_of_scheduler(config_of(scheduler))
    assert process.alphas_cumprod[-1] == 0
    np.testing.assert_allclose(process.alphas_cumprod, scheduler.alphas_cumprod, atol=1e-5)
    with pytest.raises(InputError):  # ε says nothing where there is only noise
        process_of_scheduler({"_class_name": "DDPMScheduler", "rescale_betas_zero_snr": True})


def test_the_early_name_of_the_prediction():
    early = {"_class_name": "DDPMScheduler", "predict_epsilon": False}
    assert process_of_scheduler(early).mean_type == "x_start"
    assert process_of_scheduler(early | {"predict_epsilon": True}).mean_type == "epsilon"
    assert process_of_scheduler(early | {"prediction_type": "sample"}).mean_type == "x_start"
    with pytest.raises(InputError, match="predict_epsilon is False and prediction_type 'epsilon'"):
        process_of_scheduler(early | {"prediction_type": "epsilon"})


@pytest.fixture
def pipeline(tmp_path):
    """A saved pipeline whose schedule is not the usual one."""
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    pipe = diffusers.DDIMPipeline(diffusers.UNet2DModel(**UNET), scheduler)
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.mark.parametrize("beside", [False, True])
def test_a_pipeline_is_sampled_by_its_own_process(pipeline, tmp_path, beside):
    if beside:  # the layout of the first releases: everything in one folder
        for path in (pipeline / "unet", pipeline / "scheduler"):
            for file in path.iterdir():
                file.rename(pipeline / file.name)
            path.rmdir()
    checkpoint = fastdiff.load(pipeline)
    assert checkpoint.diffusion.mean_type == "x_start"
    np.testing.assert_array_equal(
        checkpoint.diffusion.betas, fastdiff.create_diffusion(noise_schedule="cosine").betas
    )
    again = fastdiff.load(
        fastdiff.save(tmp_path / "ours", checkpoint.model, diffusion=checkpoint.diffusion)
    )
    assert again.config == checkpoint.config
    out = tmp_path / "samples"
    flags = ["--num", "2", "--steps", "3", "--device", "cpu", "--out", str(out)]
    assert main(["sample", "--checkpoint", str(pipeline), *flags]) == 0
    assert list(out.glob("*.npz"))


def test_a_network_alone_has_no_process(pipeline):
    assert fastdiff.load(pipeline / "unet").diffusion is None


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("_class_name", "FlowMatchEulerDiscreteScheduler", "whose process fastdiff has not"),
        ("_class_name", None, "_class_name is None"),
        ("beta_schedule", "laplace", "beta_schedule is 'laplace'; expected one of linear"),
        ("beta_schedule", ["linear"], "beta_schedule is"),
        ("prediction_type", "flow_prediction", "expected one of epsilon, sample, v_prediction"),
        ("variance_type", "fixed_large_log", "variance_type is 'fixed_large_log'"),
        ("variance_type", "learned", "variance_type is 'learned'"),
        ("timestep_type", "continuous", "timestep_type is 'continuous'; expected 'discrete'"),
        ("use_flow_sigmas", True, "use_flow_sigmas is True; expected False"),
        ("num_train_timesteps", 0, "num_train_timesteps is 0; expected an integer of 1"),
        ("num_train_timesteps", 10**13, "num_train_timesteps is 10000000000000"),
        ("num_train_timesteps", True, "num_train_timesteps is True"),
        ("num_train_timesteps", "many", "num_train_timesteps is 'many'"),
        ("beta_end", "0.02", "beta_end is '0.02'; expected a number between 0 and 1"),
        ("beta_start", -1.0, "beta_start is -1.0"),
        ("trained_betas", [0.1, 2.0], r"betas must lie in \(0, 1\], got 2.0"),
        ("trained_betas", {"a": 1}, "betas must be an array of numbers"),
    ],
)
def test_other_processes_are_refused_with_the_file_and_the_field(pipeline, field, value, expected):
    file = pipeline / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(InputError, match=expected) as refusal:
        fastdiff.load(pipeline)
    assert str(file) in str(refusal.value) and "\n" not in str(refusal.value)
    assert fastdiff.load(pipeline / "unet").model.image_size == 8  # the network can still be had

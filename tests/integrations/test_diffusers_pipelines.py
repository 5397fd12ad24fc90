"""accelerate_pipeline: the pipeline's own call, the same images for the same generator."""

import copy
import inspect
import pickle
import subprocess
import sys
import warnings

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.acceleration import is_accelerated
from fastdiff.errors import InputError
from fastdiff.integrations.diffusers import accelerate_pipeline, restore_pipeline
from fastdiff.integrations.diffusers import pipelines as _pipelines
from pipeline_tools import MILD, SCHEDULERS, assert_same, drawn, pipeline, unet


@pytest.mark.seconds
@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "kind, config, options",
    [
        ("ddpm", MILD, {}),
        ("ddpm", {"variance_type": "fixed_large", "prediction_type": "v_prediction"}, {}),
        ("ddim", MILD, {}),
        ("ddim", {"prediction_type": "v_prediction"}, {}),
        ("ddim", {"timestep_spacing": "trailing", "clip_sample": False} | MILD, {}),
        ("ddim", {"prediction_type": "sample"}, {"eta": 0.7}),
        ("ddim", MILD, {"eta": 1.0, "use_clipped_model_output": True}),
    ],
)
def test_the_same_images(kind, config, options):
    assert_same(pipeline(kind, SCHEDULERS[kind](**config)), **options)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("steps", [10, 20])
def test_dpm_solver_in_a_ddpm_pipeline(algorithm, steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type=algorithm, **MILD)
    assert_same(pipeline("ddpm", scheduler), num_inference_steps=steps)


@pytest.mark.seconds
def test_a_learned_variance():
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", **MILD)
    assert_same(pipeline("ddpm", scheduler, out_channels=6))


@pytest.mark.seconds
def test_class_labels():
    pipe = accelerate_pipeline(pipeline("ddim", num_class_embeds=4))
    one, _ = drawn(pipe, class_labels=[1, 1])
    two, _ = drawn(pipe, class_labels=torch.tensor([1, 3]))
    assert np.abs(one[0] - two[0]).max() < 1e-4 < np.abs(one[1] - two[1]).max()
    model = pipe.unet
    sampler = fastdiff.Sampler(
        model,
        pipe.scheduler.sampling_rows(torch.device("cpu")).table,
    )
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    kwargs = {"class_labels": torch.tensor([1, 3])}
    expected = sampler.sample((2, 3, 8, 8), noise=noise, model_kwargs=kwargs)
    images = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(images - two).max() < 1e-5
    with pytest.raises(InputError, match=r"class_labels have shape \(3,\); expected \(2,\)"):
        drawn(pipe, class_labels=[1, 2, 3])
    with pytest.raises(InputError, match="the U-Net is not class-conditional"):
        drawn(accelerate_pipeline(pipeline()), class_labels=[1, 2])


@pytest.mark.seconds
def test_what_comes_back():
    pipe = accelerate_pipeline(pipeline("ddim"))
    call = {"batch_size": 2, "num_inference_steps": 5}
    images = pipe(**call).images
    assert images[0].size == (8, 8) and images[0].mode == "RGB"
    (tensor,) = pipe(**call, output_type="pt", return_dict=False)
    assert tensor.shape == (2, 3, 8, 8) and 0 <= tensor.min() and tensor.max() <= 1
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    both = pipe(**call, generator=generators, output_type="np").images
    alone, _ = drawn(pipe, seed=4, batch_size=1, num_inference_steps=5)
    assert np.abs(both[1] - alone[0]).max() < 1e-4
    with pytest.raises(InputError, match="2 generators for a batch of 3"):
        pipe(batch_size=3, generator=generators)


@pytest.mark.seconds
def test_bfloat16_is_close_and_the_unet_may_be_cast_too():
    pipe = pipeline("ddim")
    expected, _ = drawn(pipe)
    for change in (
        lambda: accelerate_pipeline(pipe, dtype=torch.bfloat16),
        lambda: accelerate_pipeline(restore_pipeline(pipe)).unet.to(torch.bfloat16),
    ):
        change()
        actual, _ = drawn(pipe)
        psnr = -10 * np.log10(np.square(actual - expected).mean())
        assert 15 < psnr < 90


# --- What changes afterwards ------------------------------------------------------------------


@pytest.mark.seconds
def test_everything_set_afterwards_counts():
    pipe, plain = accelerate_pipeline(pipeline("ddim")), pipeline("ddim")
    drawn(pipe, num_inference_steps=20)
    # Weights in place, another U-Net, another scheduler, an attention processor, a LoRA layer.
    for change in (_scale_weights, _other_unet, _other_scheduler, _other_processor, _wrap_linear):
        before, _ = drawn(pipe, num_inference_steps=20)
        for each in (pipe, plain):
            change(each)
        actual, _ = drawn(pipe, num_inference_steps=20)
        expected, _ = drawn(plain, num_inference_steps=20)
        assert np.abs(actual - expected).max() <= 1e-3, change
        assert np.abs(actual - before).max() > 1e-2, change


def _scale_weights(pipe):
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.data.mul_(1.1)


def _other_unet(pipe):
    pipe.unet = unet(block_out_channels=(8, 16))


def _other_scheduler(pipe):
    config = pipe.scheduler.config
    pipe.scheduler = diffusers.DDIMScheduler.from_config(config, beta_end=0.001)


class HalfAttention:
    def __call__(self, attn, hidden_states, *args, **kwargs):
        return 0.5 * hidden_states


def _other_processor(pipe):
    for part in pipe.unet.modules():
        if hasattr(part, "processor"):
            part.processor = HalfAttention()


class Adapted(nn.Module):
    """A linear layer with a low-rank addition, as peft wraps them."""

    def __init__(self, base):
        super().__init__()
        torch.manual_seed(1)
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + 3 * self.up(self.down(x))


def _wrap_linear(pipe):
    for part in pipe.unet.modules():
        if isinstance(getattr(part, "time_emb_proj", None), nn.Linear):
            part.time_emb_proj = Adapted(part.time_emb_proj)


@pytest.mark.seconds
def test_what_fastdiff_cannot_express_runs_as_before_and_says_so():
    schedulers = (
        diffusers.DDIMScheduler(thresholding=True, **MILD),
        diffusers.DDPMScheduler(thresholding=True, prediction_type="v_prediction"),
        diffusers.KDPM2AncestralDiscreteScheduler(),
    )
    for scheduler in schedulers:
        pipe, plain = pipeline("ddpm", scheduler), pipeline("ddpm", copy.deepcopy(scheduler))
        accelerate_pipeline(pipe)
        call = {"num_inference_steps": 6}
        with pytest.warns(RuntimeWarning, match="runs through diffusers' own loop"):
            actual, _ = drawn(pipe, **call)
        np.testing.assert_allclose(actual, drawn(plain, **call)[0], atol=1e-3)
        assert pipe.explain().startswith("diffusers' own loop: ")
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            drawn(pipe, **call)  # said once


# --- Saving, undoing --------------------------------------------------------------------------


@pytest.mark.seconds
def test_a_saved_pipeline_is_a_stock_one(tmp_path):
    pipe = accelerate_pipeline(pipeline("ddim"))
    expected, _ = drawn(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    script = """
import sys
sys.modules["fastdiff"] = None  # importing it fails
import diffusers, numpy, torch
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipe) is diffusers.DDIMPipeline and type(pipe.scheduler) is diffusers.DDIMScheduler
generator = torch.Generator().manual_seed(3)
images = pipe(batch_size=2, generator=generator, num_inference_steps=50, output_type="np").images
numpy.save(sys.argv[2], images)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "saved"), str(tmp_path / "images.npy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.abs(np.load(tmp_path / "images.npy") - expected).max() <= 1e-3


@pytest.mark.seconds
def test_restore():
    pipe = pipeline("ddim")
    expected, _ = drawn(pipe)
    with pytest.raises(InputError, match="this DDIMPipeline is not accelerated"):
        restore_pipeline(pipe)
    restore_pipeline(accelerate_pipeline(pipe))
    assert type(pipe) is diffusers.DDIMPipeline
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    assert np.array_equal(drawn(pipe)[0], expected)
    with pytest.raises(InputError, match="pipe is a Linear; expected a DDPMPipeline, DDIMPipeline"):
        accelerate_pipeline(nn.Linear(2, 2))


def test_a_schedulers_own_changes_stay(tmp_path):
    pipe, plain = pipeline("ddim"), pipeline("ddim")
    for each in (pipe, plain):
        each.scheduler.alphas_cumprod = each.scheduler.alphas_cumprod**0.8
    given = pipe.scheduler
    accelerate_pipeline(pipe)
    call = {"num_inference_steps": 10}
    assert np.abs(drawn(pipe, **call)[0] - drawn(plain, **call)[0]).max() <= 1e-3
    restore_pipeline(pipe)
    assert pipe.scheduler is given


@pytest.mark.seconds
def test_copies_of_an_accelerated_pipeline():
    pipe = accelerate_pipeline(pipeline("ddim"))
    call = {"num_inference_steps": 5}
    expected, _ = drawn(pipe, **call)
    twin = copy.deepcopy(pipe)
    assert np.abs(drawn(twin, **call)[0] - expected).max() < 1e-5
    restore_pipeline(copy.deepcopy(twin))
    assert is_accelerated(twin.unet) and is_accelerated(pipe.unet)
    restore_pipeline(twin)
    assert not is_accelerated(twin.unet) and type(twin.scheduler) is diffusers.DDIMScheduler
    pipe.unet = copy.deepcopy(pipe.unet)
    assert np.abs(drawn(pipe, **call)[0] - expected).max() < 1e-5
    again = pickle.loads(pickle.dumps(pipe))
    assert type(again) is diffusers.DDIMPipeline
    assert np.abs(drawn(again, **call)[0] - expected).max() < 1e-3


def test_all_unets_are_restored():
    pipe = pipeline("ddim")
    first = pipe.unet
    accelerate_pipeline(pipe)
    pipe.unet = unet(block_out_channels=(8, 16))
    drawn(pipe, num_inference_steps=3)
    restore_pipeline(pipe)
    assert not is_accelerated(first) and not is_accelerated(pipe.unet)


@pytest.mark.parametrize(
    "options", [{"dtype": "bf16"}, {"capture": "always"}, {"compile": 3}, {"dtype": torch.float64}]
)
def test_bad_options_change_nothing(options):
    pipe = pipeline("ddim")
    with pytest.raises(InputError, match="dtype is|capture is|compile is"):
        accelerate_pipeline(pipe, **options)
    assert type(pipe) is diffusers.DDIMPipeline and not is_accelerated(pipe.unet)


def test_arguments_of_another_diffusers_go_to_its_own_loop(monkeypatch):
    stock = diffusers.DDIMPipeline.__call__
    seen = []

    def newer(self, batch_size=1, generator=None, eta=0.0, num_inference_steps=50, *rest, note=1):
        seen.append(note)
        return stock(self, batch_size, generator, eta, num_inference_steps, *rest)

    signature = inspect.signature(stock)
    note = inspect.Parameter("note", inspect.Parameter.KEYWORD_ONLY, default=1)
    newer.__signature__ = signature.replace(parameters=[*signature.parameters.values(), note])
    monkeypatch.setattr(diffusers.DDIMPipeline, "__call__", newer)
    _pipelines._accelerated_class.cache_clear()
    try:
        pipe = accelerate_pipeline(pipeline("ddim"))
        call = {"batch_size": 1, "num_inference_steps": 2}
        for options in ({}, {"note": 1}, {"class_labels": None}):
            pipe(**call, **options)
            assert pipe.explain().startswith("eager") and not seen
        pipe(**call, note=2)
        assert seen == [2]
    finally:
        _pipelines._accelerated_class.cache_clear()
    with pytest.raises(TypeError, match="unexpected keyword argument 'unknown'"):
        accelerate_pipeline(pipeline("ddim"))(unknown=1)


@pytest.mark.parametrize("labels", [[1, 4], [-1, 0], [0.5, 1.0], "ab", [True, False]])
def test_bad_labels(labels):
    pipe = accelerate_pipeline(pipeline("ddim", num_class_embeds=4))
    with pytest.raises(InputError, match="class_labels are"):
        drawn(pipe, class_labels=labels, num_inference_steps=3)

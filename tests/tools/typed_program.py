"""A user's program, for mypy alone: every public name, with the type that its use has."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff import ops
from fastdiff.data import ImageDataset, load_dataset
from fastdiff.sampling.timesteps_file import MeasuredTimesteps
from fastdiff.training import TrainConfig, Trainer

# Networks and processes
model = fastdiff.UNet.from_preset("digits", num_classes=10)
assert_type(model, fastdiff.UNet)
betas = fastdiff.get_named_beta_schedule("linear", 1000)
assert_type(betas, npt.NDArray[np.float64])
assert_type(fastdiff.linear_betas(1000), npt.NDArray[np.float64])
assert_type(fastdiff.cosine_betas(1000), npt.NDArray[np.float64])
assert_type(fastdiff.rescale_zero_terminal_snr(betas), npt.NDArray[np.float64])
assert_type(fastdiff.space_timesteps(1000, "50"), list[int])
process = fastdiff.create_diffusion(steps=1000, noise_schedule="cosine", learn_sigma=True)
assert_type(process, fastdiff.GaussianDiffusion)
assert_type(fastdiff.GaussianDiffusion(betas, mean_type="v"), fastdiff.GaussianDiffusion)
exploding = fastdiff.VarianceExploding([0.1, 1.0, 10.0])
edm = fastdiff.EDM(sigma_data=0.5)
for scored in (process, exploding, edm):
    assert_type(scored.score(model, torch.randn(2, 1, 8, 8), torch.tensor([0, 7])), Tensor)
assert_type(edm.respace(18), fastdiff.EDM)
assert_type(edm.training_losses(model, torch.randn(2, 1, 8, 8), torch.rand(2)), dict[str, Tensor])
assert_type(fastdiff.best_timesteps(process, 50, betas), list[int])
measured = fastdiff.measured_timesteps(model, process, 5, shape=(2, 1, 8, 8), budget=500)
assert_type(measured, MeasuredTimesteps)

classifier = fastdiff.EncoderUNet.from_preset("classifier-digits")
assert_type(classifier, fastdiff.EncoderUNet)
assert_type(fastdiff.NoisyClassification(process).diffusion, fastdiff.GaussianDiffusion)

# Sampling
table = fastdiff.StepTable.from_process(process, method="ddim")
assert_type(table, fastdiff.StepTable)
sampler = fastdiff.Sampler(model, process, steps=50, method="ddim")
assert_type(sampler.sample((4, 1, 8, 8), seed=0), Tensor)
assert_type(sampler.iterate((4, 1, 8, 8)), Iterator[dict[str, Any]])
fastdiff.Sampler(lambda x, t: x, exploding, steps=20)
cond_fn = fastdiff.classifier_gradient(classifier, scale=2.0)
fastdiff.Sampler(model, process, steps=20, cond_fn=cond_fn)
fastdiff.Sampler(lambda x, t: x, edm, steps=18)

# Operations
x, qkv, row = torch.randn(2, 32, 4, 4), torch.randn(2, 96, 16), torch.ones(1000)
t, weight = torch.tensor([1, 2]), torch.ones(32)
assert_type(ops.q_sample(x, t, row, row, seed=0), tuple[Tensor, Tensor | None])
assert_type(ops.posterior_step(x, x, table, 3), tuple[Tensor, Tensor | None])
assert_type(ops.group_norm_silu(x, 4, weight, None, activation=None), Tensor)
assert_type(ops.convolution(x, torch.ones(2, 32, 1, 1)), tuple[Tensor, Tensor | None])
assert_type(ops.norm_coefficients(torch.ones(2, 2, 4), 2, row[:4], row[:4]), Tensor)
assert_type(ops.residual_norm(x, 4, weight, None), tuple[Tensor, Tensor])
assert_type(ops.rms_norm_silu(x, weight), Tensor)
assert_type(fastdiff.ops.attention(qkv, 4, order="qkv_first"), Tensor)
assert_type(str(fastdiff.explain("attention", qkv, 4)), str)
with fastdiff.backend("reference"):
    assert_type(ops.attention(qkv, 4), Tensor)
fastdiff.set_backend(None)

# Models that exist, and checkpoints
net = nn.Sequential(nn.GroupNorm(4, 32), nn.SiLU())
assert_type(fastdiff.accelerate(net), nn.Sequential)
assert_type(str(fastdiff.report(net)), str)
assert_type(fastdiff.restore(net), nn.Sequential)
ema = fastdiff.EMA(model, (0.999,))
assert_type(fastdiff.save("checkpoint", model, diffusion=process, ema=ema), Path)
loaded = fastdiff.load(Path("checkpoint"), weights=0.999)
assert_type(loaded, fastdiff.Checkpoint)
unet: fastdiff.UNet = loaded.model
fastdiff.load("weights", model=lambda: net)
fastdiff.load("weights", model=net)

# Training
dataset = load_dataset("digits")
assert_type(dataset, ImageDataset)
trainer = Trainer(model, process, dataset, TrainConfig(steps=10, ema=(0.99,)), "run")
try:
    assert_type(trainer.fit(), int)
except (fastdiff.InputError, fastdiff.TrainingError) as error:
    assert_type(error, fastdiff.InputError | fastdiff.TrainingError)

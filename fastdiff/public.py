"""The public names: what ``fastdiff.<name>`` is. Loaded, with torch, when the first is used."""

from fastdiff import ops
from fastdiff.acceleration import accelerate, report, restore
from fastdiff.checkpoints.checkpoint import Checkpoint, load, save
from fastdiff.errors import InputError, TrainingError
from fastdiff.methods.table import StepTable
from fastdiff.models.ema import EMA
from fastdiff.models.encoder_unet import EncoderUNet
from fastdiff.models.unet import UNet
from fastdiff.ops.backends import backend, set_backend
from fastdiff.ops.dispatch import explain
from fastdiff.process.best_timesteps import best_timesteps
from fastdiff.process.classification import NoisyClassification
from fastdiff.process.edm import EDM
from fastdiff.process.gaussian import GaussianDiffusion, create_diffusion
from fastdiff.process.respacing import space_timesteps
from fastdiff.process.schedules import (
    cosine_betas,
    get_named_beta_schedule,
    linear_betas,
    rescale_zero_terminal_snr,
)
from fastdiff.process.variance_exploding import VarianceExploding
from fastdiff.sampling.classifier_gradient import classifier_gradient
from fastdiff.sampling.measured_timesteps import measured_timesteps
from fastdiff.sampling.sampler import Sampler

__all__ = [
    "EDM",
    "EMA",
    "Checkpoint",
    "EncoderUNet",
    "GaussianDiffusion",
    "InputError",
    "NoisyClassification",
    "Sampler",
    "StepTable",
    "TrainingError",
    "UNet",
    "VarianceExploding",
    "accelerate",
    "backend",
    "best_timesteps",
    "classifier_gradient",
    "cosine_betas",
    "create_diffusion",
    "explain",
    "get_named_beta_schedule",
    "linear_betas",
    "load",
    "measured_timesteps",
    "ops",
    "report",
    "rescale_zero_terminal_snr",
    "restore",
    "save",
    "set_backend",
    "space_timesteps",
]

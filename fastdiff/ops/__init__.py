"""The fused operations: each checks its arguments, chooses an implementation and launches it."""

from fastdiff.ops.attention.op import attention
from fastdiff.ops.convolution.op import convolution
from fastdiff.ops.group_norm_silu.op import group_norm_silu
from fastdiff.ops.norm_coefficients.op import norm_coefficients
from fastdiff.ops.posterior_step.op import posterior_step
from fastdiff.ops.q_sample.op import q_sample
from fastdiff.ops.residual_norm.op import residual_norm
from fastdiff.ops.rms_norm_silu.op import rms_norm_silu

__all__ = [
    "attention",
    "convolution",
    "group_norm_silu",
    "norm_coefficients",
    "posterior_step",
    "q_sample",
    "residual_norm",
    "rms_norm_silu",
]

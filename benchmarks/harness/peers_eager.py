"""The operations as the published codebases run them: one PyTorch call per line of arithmetic.

The process is improved-diffusion's (GaussianDiffusion.p_mean_variance and p_sample after the
network, q_sample), in our words: float64 numpy tables of which each step gathers a row, copies it
to the device and spreads it over the batch.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.shapes import GROUPS


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


def group_norm_film_silu(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    h = F.group_norm(x, GROUPS, weight, bias)
    return F.silu(h * (1 + scale[..., None, None]) + shift[..., None, None])


def group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, GROUPS, weight, bias)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """denoising-diffusion-pytorch's RMSNorm, in our words; weight (1, C, 1, 1)."""
    return F.normalize(x, dim=1) * weight * x.shape[1] ** 0.5


def rms_norm_silu(x: Tensor, weight: Tensor) -> Tensor:
    return F.silu(rms_norm(x, weight))


def rms_norm_film_silu(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale and shift are (N, C, 1, 1), as its Block gets them."""
    return F.silu(rms_norm(x, weight) * (scale + 1) + shift)


def attention(qkv: Tensor, num_heads: int, order: str) -> Tensor:
    """F.scaled_dot_product_attention on views of the qkv projection: (N, 3C, T) -> (N, C, T)."""
    n, width, tokens = qkv.shape
    head_dim = width // (3 * num_heads)
    if order == "heads_first":
        q, k, v = qkv.view(n, num_heads, 3, head_dim, tokens).transpose(3, 4).unbind(2)
    else:
        q, k, v = qkv.view(n, 3, num_heads, head_dim, tokens).transpose(3, 4).unbind(1)
    h = F.scaled_dot_product_attention(q, k, v)  # (N, H, T, D)
    return h.transpose(1, 2).reshape(n, tokens, -1).transpose(1, 2)


class Process:
    """The linear DDPM process with 1000 steps; predicts ε, clips x_0.

    device: None keeps the tables in numpy, as published; else they are float32 tensors there, which
    a compiler can fuse over and a CUDA graph can hold.
    """

    def __init__(self, learned_range: bool = False, device: torch.device | None = None):
        self.learned_range, self.device = learned_range, device
        betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
        bar = np.cumprod(1 - betas)
        bar_prev = np.append(1.0, bar[:-1])
        small = betas * (1 - bar_prev) / (1 - bar)
        self.sqrt_alphas_cumprod = self._table(np.sqrt(bar))
        self.sqrt_one_minus_alphas_cumprod = self._table(np.sqrt(1 - bar))
        self.sqrt_recip_alphas_cumprod = self._table(np.sqrt(1 / bar))
        self.sqrt_recipm1_alphas_cumprod = self._table(np.sqrt(1 / bar - 1))
        self.posterior_mean_coef1 = self._table(betas * np.sqrt(bar_prev) / (1 - bar))
        self.posterior_mean_coef2 = self._table((1 - bar_prev) * np.sqrt(1 - betas) / (1 - bar))
        self.posterior_log_variance_clipped = self._table(np.log(np.append(small[1], small[1:])))
        self.log_betas = self._table(np.log(betas))
        large = np.append(small[1], betas[1:])
        self.fixed_large, self.log_fixed_large = self._table(large), self._table(np.log(large))

    def _table(self, values: np.ndarray) -> np.ndarray | Tensor:
        if self.device is None:
            return values
        return torch.from_numpy(values).float().to(self.device)

    def extract(self, table: np.ndarray | Tensor, t: Tensor, shape: torch.Size) -> Tensor:
        """Row t of a table as a tensor of ``shape``."""
        if isinstance(table, np.ndarray):
            table = torch.from_numpy(table).to(t.device)
        row = table[t].float()
        return row.view(-1, *(1 for _ in shape[1:])).expand(shape)

    def q_sample(self, x_start: Tensor, t: Tensor) -> Tensor:
        noise = torch.randn_like(x_start)
        x_t = (
            self.extract(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
            + self.extract(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * noise
        )
        return x_t.to(x_start.dtype)

    def p_mean_variance(self, x: Tensor, t: Tensor, output: Tensor) -> dict[str, Tensor]:
        shape = x.shape
        if self.learned_range:
            output, v = torch.split(output, x.shape[1], dim=1)
            least = self.extract(self.posterior_log_variance_clipped, t, shape)
            most = self.extract(self.log_betas, t, shape)
            share = (v + 1) / 2
            log_variance = share * most + (1 - share) * least
            variance = torch.exp(log_variance)
        else:
            variance = self.extract(self.fixed_large, t, shape)
            log_variance = self.extract(self.log_fixed_large, t, shape)
        x_start = (
            self.extract(self.sqrt_recip_alphas_cumprod, t, shape) * x
            - self.extract(self.sqrt_recipm1_alphas_cumprod, t, shape) * output
        ).clamp(-1, 1)
        mean = (
            self.extract(self.posterior_mean_coef1, t, shape) * x_start
            + self.extract(self.posterior_mean_coef2, t, shape) * x
        )
        return {
            "mean": mean,
            "variance": variance,
            "log_variance": log_variance,
            "pred_xstart": x_start,
        }

    def p_sample(self, x: Tensor, output: Tensor, t: Tensor) -> dict[str, Tensor]:
        """x (N, C, H, W), output (N, C or 2C, H, W), t (N,) -> {"sample", "pred_xstart"}."""
        out = self.p_mean_variance(x, t, output)
        noise = torch.randn_like(x)
        nonzero = (t != 0).float().view(-1, *(1 for _ in x.shape[1:]))
        sample = out["mean"] + nonzero * torch.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample.to(x.dtype), "pred_xstart": out["pred_xstart"].to(x.dtype)}


def ddim_step(x: Tensor, output: Tensor, bar: float, bar_prev: float) -> Tensor:
    """GaussianDiffusion.ddim_sample with η = 0, from ᾱ to ᾱ_prev, which are numbers: on a GPU
    nothing is copied and nothing waits."""
    x_start = ((x - (1 - bar) ** 0.5 * output) / bar**0.5).clamp(-1, 1)
    eps = (x - bar**0.5 * x_start) / (1 - bar) ** 0.5
    return bar_prev**0.5 * x_start + (1 - bar_prev) ** 0.5 * eps

"""GaussianDiffusion: the variance-preserving diffusion process, its losses and its likelihood."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdiff.checks import check_float, check_like, is_finite
from fastdiff.errors import InputError
from fastdiff.ops.normal import draw_like
from fastdiff.process.forward import mean_flat, posterior_mean
from fastdiff.process.likelihood import discretized_gaussian_log_likelihood, normal_kl
from fastdiff.process.published_loops import SamplingLoops, StepNoise, countdown, noise_of_step
from fastdiff.process.respacing import chosen_timesteps
from fastdiff.process.reverse import Model, check_choice, eps_from_xstart
from fastdiff.process.tables import FloatArray, TablesAt

LOSS_TYPES = ("mse", "rescaled_mse", "kl", "rescaled_kl")


class GaussianDiffusion(SamplingLoops):
    """A diffusion process over K steps, and what a network that reverses it is asked to predict.

    Args:
        betas: (K,) in (0, 1], the variances of the steps, step 0 the least noisy.
        mean_type: what the network predicts: ``"epsilon"``, ``"x_start"``, ``"v"`` =
            √ᾱ ε − √(1−ᾱ) x_0, or ``"previous_x"``, the mean of x_{t-1}.
        var_type: the reverse variance: ``"fixed_small"`` (β̃), ``"fixed_large"`` (β), ``"learned"``
            (the network's log-variance), ``"learned_range"`` (its interpolation between log β̃ and
            log β, Nichol & Dhariwal 2021 eq. 15).
        loss_type: ``"mse"`` (L_simple; with a learned variance plus the bound's term),
            ``"rescaled_mse"`` (L_hybrid: that term × K/1000), ``"kl"`` (the bound's term,
            bits/dim), ``"rescaled_kl"`` (× K, an estimate of the whole bound).
        rescale_timesteps: give the network timesteps scaled to 0 … 1000.
        loss_weighting: None, or ``"min_snr"`` (Hang et al. 2023, arXiv:2303.09556) for the MSE
            losses: x_0's squared error weighs min(SNR, ``min_snr_gamma``), whatever is predicted.
        min_snr_gamma: the γ of that weighting, 5 as published.
        timestep_map: for a respaced process, the (K,) timesteps of the process it was taken from:
            what the network was trained with.
        original_num_steps: for a respaced process, the length of that one.

    Attributes, float64 (K,) unless said: ``betas, alphas_cumprod, alphas_cumprod_prev,
    alphas_cumprod_next, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod, posterior_variance,
    posterior_log_variance_clipped, posterior_mean_coef1, posterior_mean_coef2``;
    ``num_timesteps`` (K), ``timestep_map`` (int64), ``model_timesteps`` (float32: what the network
    is given at each index), ``original_num_steps``.

    Raises InputError for unknown names, betas out of range, and ε-prediction on a schedule that
    ends with no signal.
    """

    def __init__(
        self,
        betas: npt.ArrayLike,
        *,
        mean_type: str = "epsilon",
        var_type: str = "fixed_small",
        loss_type: str = "mse",
        rescale_timesteps: bool = False,
        loss_weighting: str | None = None,
        min_snr_gamma: float = 5.0,
        timestep_map: Sequence[int] | npt.NDArray[np.int64] | None = None,
        original_num_steps: int | None = None,
    ):
        super().__init__(
            betas,
            mean_type=mean_type,
            var_type=var_type,
            rescale_timesteps=rescale_timesteps,
            timestep_map=timestep_map,
            original_num_steps=original_num_steps,
        )
        self.loss_type = check_choice("loss_type", loss_type, LOSS_TYPES)
        if loss_weighting not in (None, "min_snr"):
            raise InputError(f"loss_weighting must be None or 'min_snr', got {loss_weighting!r}")
        if loss_weighting is not None and loss_type in ("kl", "rescaled_kl"):
            raise InputError(f"loss_weighting applies to the mse losses, not to {loss_type!r}")
        if not (is_finite(min_snr_gamma) and min_snr_gamma > 0):
            raise InputError(f"min_snr_gamma must be a positive number, got {min_snr_gamma!r}")
        self.loss_weighting = loss_weighting
        self.min_snr_gamma = float(min_snr_gamma)
        # The keyword arguments of create_diffusion, where the process came from there.
        self._recipe: dict[str, Any] | None = None

    def respace(
        self,
        sections: str | int | Sequence[int] | None = None,
        *,
        spacing: str = "uniform",
        timesteps: Sequence[int] | npt.NDArray[np.int64] | None = None,
    ) -> "GaussianDiffusion":
        """The strided process over a subsequence of the timesteps; ᾱ at those is unchanged.

        ``sections`` as :func:`fastdiff.space_timesteps`, counted in this process's own K steps; for
        a ``spacing`` of :func:`fastdiff.process.respacing.spaced_timesteps` other than "uniform", a
        number of steps. Or ``timesteps``, a list that ascends strictly within
        0 … K − 1. Its betas are 1 − ᾱ_i / ᾱ_prev (Nichol & Dhariwal 2021 eq. 19) and the network
        still receives the original timesteps. Raises InputError for what does not fit.
        """
        chosen = chosen_timesteps(self, sections, spacing, timesteps)
        kept = self.alphas_cumprod[chosen]
        arguments = self._arguments() | {
            "betas": 1.0 - kept / np.append(1.0, kept[:-1]),
            "timestep_map": self.timestep_map[chosen],
        }
        respaced = GaussianDiffusion(**arguments)
        # The recipe has a name for sections of the whole process only.
        named = sections is not None and spacing == "uniform"
        if named and self._recipe is not None and not self._recipe["timestep_respacing"]:
            plain = sections if isinstance(sections, str) else np.asarray(sections).tolist()
            respaced._recipe = self._recipe | {"timestep_respacing": plain}
        return respaced

    def to_config(self) -> dict[str, Any]:
        """A JSON-serialisable dict from which :meth:`from_config` builds this process again.

        The keyword arguments of ``create_diffusion`` where it came from there; else the arguments
        of the constructor, betas in full.
        """
        if self._recipe is not None:
            return dict(self._recipe)
        arguments = self._arguments()
        return arguments | {
            "betas": arguments["betas"].tolist(),
            "timestep_map": arguments["timestep_map"].tolist(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GaussianDiffusion":
        """The process that :meth:`to_config` described. InputError for anything else."""
        from fastdiff.process.create import create_diffusion  # which needs this module

        if not isinstance(config, dict):
            raise InputError(f"a diffusion config must be a dict, got {type(config).__name__}")
        try:
            return cls(**config) if "betas" in config else create_diffusion(**config)
        except TypeError as error:
            raise InputError(f"not a diffusion config: {error}") from error

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Losses of one timestep per sample, each float32 (N,): {"loss"} and its parts.

        "mse" (of what the network predicts, unweighted) for the mse losses; "vb", the bound's term
        in bits/dim times the loss's own scale, for the kl losses and where a variance is learned.
        loss = weight · mse + vb. The mean is detached in the bound's term of the mse losses
        (Nichol & Dhariwal 2021 section 3.1), and x_0 is never clipped.

        ``x_start`` (N, C, ...) in [-1, 1], ``t`` (N,), ``noise`` like x_start (drawn when None,
        from ``generator``). Waits for no device. Errors: :class:`ReverseProcess`.
        """
        at = self._at(t, x_start, "x_start")
        if noise is None:
            noise = draw_like(x_start, generator)
        x_t = self.q_sample(x_start, t, noise)
        output = self._call_model(model, x_t, at, model_kwargs)
        # What x_t is made of, in the dtype of the arithmetic.
        x_start, x_t, noise = (value.to(at.dtype) for value in (x_start, x_t, noise))

        if self.loss_type in ("kl", "rescaled_kl"):
            out = self._interpret(output, x_t, at, clip_denoised=False)
            vb = self._bound_term(out, x_start, x_t, at)
            vb = vb * self.num_timesteps if self.loss_type == "rescaled_kl" else vb
            return {"loss": vb, "vb": vb}

        terms = {}
        prediction = output
        if self.learns_variance:
            prediction, values = output.chunk(2, dim=1)
            frozen = torch.cat([prediction.detach(), values], dim=1)
            out = self._interpret(frozen, x_t, at, clip_denoised=False)
            vb = self._bound_term(out, x_start, x_t, at)
            rescaled = self.loss_type == "rescaled_mse"
            terms["vb"] = vb * (self.num_timesteps / 1000.0) if rescaled else vb
        target = self._target(x_start, x_t, noise, at)
        mse = mean_flat((target - prediction) ** 2)
        loss = mse
        if self.loss_weighting is not None:
            loss = mse * at["min_snr_weight"].flatten()
        if "vb" in terms:
            loss = loss + terms["vb"]
        return {"loss": loss, "mse": mse} | terms

    def prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) ‖ N(0, 1)) in bits/dim, (N,): the term that no network changes."""
        check_float(x_start, "x_start")
        t = torch.full(x_start.shape[:1], self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    _prior_bpd = prior_bpd  # its published name

    @torch.no_grad()
    def calc_bpd_loop(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
        *,
        noise: StepNoise | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> dict[str, Tensor]:
        """The variational bound on −log2 p(x_0) per dimension, and its terms.

        {"total_bpd" (N,), "prior_bpd" (N,), "vb", "xstart_mse", "mse" (N, K)}; column j is step
        t = K-1-j; ``mse`` is that of ε. ``x_start`` (N, C, ...): uint8 images scaled to [-1, 1].
        ``noise`` is the draw of every step: one tensor like x_start, or a callable of the index t.
        :func:`fastdiff.process.likelihood.summarize_bpd` averages the result; errors:
        :class:`ReverseProcess`.
        """
        check_float(x_start, "x_start")
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for i in countdown(self.num_timesteps, progress):
            t = torch.full(x_start.shape[:1], i, dtype=torch.int64, device=x_start.device)
            eps = noise_of_step(noise, i)
            if eps is None:
                eps = draw_like(x_start, generator)
            x_t = self.q_sample(x_start, t, eps)
            term = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            at = TablesAt(self._tables(x_start), t, x_start)
            pred_xstart = term["pred_xstart"]
            pred_eps = eps_from_xstart(at, x_t.to(at.dtype), pred_xstart)
            columns["vb"].append(term["output"])
            columns["xstart_mse"].append(mean_flat((pred_xstart - x_start) ** 2))
            columns["mse"].append(mean_flat((pred_eps - eps) ** 2))
        terms = {name: torch.stack(column, dim=1) for name, column in columns.items()}
        prior = self.prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(dim=1) + prior, "prior_bpd": prior} | terms

    def _vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The bound's term at t, bits/dim: {"output" (N,), "pred_xstart" like x_t}."""
        check_like(x_start, "x_start", x_t, "x_t")
        out = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
        at = TablesAt(self._tables(x_t), t, x_t)
        output = self._bound_term(out, x_start.to(at.dtype), x_t.to(at.dtype), at)
        return {"output": output, "pred_xstart": out["pred_xstart"]}

    def _bound_term(
        self, out: dict[str, Tensor], x_start: Tensor, x_t: Tensor, at: TablesAt
    ) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) ‖ p), at t = 0 the decoder's NLL; (N,) in bits/dim."""
        kl = normal_kl(
            posterior_mean(at, x_start, x_t),
            at["posterior_log_variance_clipped"],
            out["mean"],
            out["log_variance"],
        )
        nll = -discretized_gaussian_log_likelihood(
            x_start, means=out["mean"], log_scales=0.5 * out["log_variance"]
        )
        return torch.where(at.rows == 0, mean_flat(nll), mean_flat(kl)) / math.log(2.0)

    def _target(self, x_start: Tensor, x_t: Tensor, noise: Tensor, at: TablesAt) -> Tensor:
        if self.mean_type == "epsilon":
            return noise
        if self.mean_type == "x_start":
            return x_start
        if self.mean_type == "previous_x":
            return posterior_mean(at, x_start, x_t)
        return at["sqrt_alphas_cumprod"] * noise - at["sqrt_one_minus_alphas_cumprod"] * x_start

    def _named_tables(self) -> dict[str, FloatArray]:
        return super()._named_tables() | {"min_snr_weight": self._min_snr_weight()}

    def _min_snr_weight(self) -> FloatArray:
        """min(SNR, γ) on x_0's squared error, as a weight on that of what is predicted.

        Hang et al. 2023 section 3.4, multiplied out so that SNR = ᾱ / (1 − ᾱ) may be 0.
        """
        signal, noise, gamma = self.alphas_cumprod, 1.0 - self.alphas_cumprod, self.min_snr_gamma
        if self.mean_type == "epsilon":  # min(SNR, γ) / SNR
            return np.minimum(1.0, gamma * noise / signal)
        if self.mean_type == "v":  # min(SNR, γ) / (SNR + 1)
            return np.minimum(signal, gamma * noise)
        weight = np.minimum(signal / noise, gamma)
        # x_0 enters the mean of x_{t-1} times coef1.
        return weight / self.posterior_mean_coef1**2 if self.mean_type == "previous_x" else weight

    def _arguments(self) -> dict[str, Any]:
        return {
            "betas": self.betas,
            "mean_type": self.mean_type,
            "var_type": self.var_type,
            "loss_type": self.loss_type,
            "rescale_timesteps": self.rescale_timesteps,
            "loss_weighting": self.loss_weighting,
            "min_snr_gamma": self.min_snr_gamma,
            "timestep_map": self.timestep_map,
            "original_num_steps": self.original_num_steps,
        }

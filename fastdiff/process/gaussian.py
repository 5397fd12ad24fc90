"""GaussianDiffusion: the variance-preserving diffusion process; create_diffusion, which makes one.

The equations stand in forward.py, reverse.py, losses.py, likelihood.py; a step is a table's row.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdiff.checks import check_float, check_like
from fastdiff.errors import InputError
from fastdiff.methods.levels import Float64Array
from fastdiff.methods.table import StepTable
from fastdiff.ops.counters import Counters
from fastdiff.ops.normal import draw_like
from fastdiff.ops.q_sample.op import q_sample
from fastdiff.process import likelihood, losses, reverse, schedules
from fastdiff.process.between import (
    Grid,
    betas_of_log_snr,
    check_original,
    is_whole,
    log_snr_of_betas,
)
from fastdiff.process.forward import forward_tables, posterior_mean
from fastdiff.process.published_loops import DDIMLoopArguments, LoopArguments, StepNoise, last, loop
from fastdiff.process.respacing import Respaced
from fastdiff.process.reverse import DDIMStepArguments, Model, StepArguments, step_at
from fastdiff.process.score import Scored
from fastdiff.process.tables import Tables, TimestepMap, check_timestep_map
from fastdiff.process.update import DenoisedFn
from fastdiff.records import called_with


class GaussianDiffusion(Scored, Respaced):
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
        original_betas: for a respaced process, the betas of that one, by which levels between its
            steps are found.

    Its methods take ``x_start`` in [-1, 1], ``x``, ``x_t``: (N, ...) float; ``t``: (N,) integer in
    0 … K-1, the index into this process's steps; and
    :class:`fastdiff.process.reverse.StepArguments`. The arithmetic is float32 (float64 for float64
    x), which is what statistics and losses come in; samples are like x.

    Raises InputError for unknown names, betas out of range, ε-prediction on a schedule that ends
    with no signal, and a t out of range on the CPU; elsewhere that gives NaN: nothing waits there.
    """

    betas: Float64Array  # (K,), as all of these
    alphas_cumprod: Float64Array
    alphas_cumprod_prev: Float64Array
    alphas_cumprod_next: Float64Array
    sqrt_alphas_cumprod: Float64Array
    sqrt_one_minus_alphas_cumprod: Float64Array
    posterior_variance: Float64Array
    posterior_log_variance_clipped: Float64Array
    posterior_mean_coef1: Float64Array
    posterior_mean_coef2: Float64Array
    prior_std = 1.0  # of x_T
    continuous = False  # t of training_losses is one of the K steps

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
        timestep_map: TimestepMap | None = None,
        original_num_steps: int | None = None,
        original_betas: npt.ArrayLike | None = None,
    ):
        tables = forward_tables(betas)
        vars(self).update(tables)
        self.num_timesteps = count = len(self.betas)
        self.original_betas, original_num_steps = check_original(
            "original_betas", original_betas, original_num_steps, schedules.check_betas
        )
        maps = check_timestep_map(timestep_map, original_num_steps, count)
        self.timestep_map, self.original_num_steps = maps
        self.rescale_timesteps = bool(rescale_timesteps)
        # float32 · float32, as the published wrapper multiplies: networks get the same numbers.
        scale = np.float32(1000.0 / self.original_num_steps if rescale_timesteps else 1.0)
        self.model_timesteps = self.timestep_map.astype(np.float32) * scale

        self.mean_type = reverse.check_choice("mean_type", mean_type, reverse.MEAN_TYPES)
        self.var_type = reverse.check_choice("var_type", var_type, reverse.VAR_TYPES)
        self.learns_variance = var_type in ("learned", "learned_range")
        self.loss_type = reverse.check_choice("loss_type", loss_type, losses.LOSS_TYPES)
        losses.check_weighting(loss_type, loss_weighting, min_snr_gamma)
        self.loss_weighting, self.min_snr_gamma = loss_weighting, float(min_snr_gamma)

        # As fastdiff.methods.protocol.Process names them.
        self.signal_scale = self.sqrt_alphas_cumprod
        self.noise_scale = self.sqrt_one_minus_alphas_cumprod
        self.input_scale = np.ones(self.num_timesteps)
        self.last_variance = float(tables["fixed_large_variance"][0])

        tables |= reverse.reverse_tables(tables, mean_type, var_type)
        tables["model_timesteps"] = self.model_timesteps.astype(np.float64)
        tables["min_snr_weight"] = losses.min_snr_weight(tables, mean_type, self.min_snr_gamma)
        self._tables = Tables(tables)
        self._step_tables: dict[tuple, tuple[StepTable, Tensor]] = {}
        self._recipe: dict[str, Any] | None = None  # create_diffusion's arguments, if it was that

    # --- q: from data to noise ---

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0), eq. 4; each (N, ...) like x_start."""
        at = self._tables.at(t, x_start, "x_start")
        mean = at["sqrt_alphas_cumprod"] * x_start.to(at.dtype)
        variance = at["one_minus_alphas_cumprod"].expand(x_start.shape)
        return mean, variance, at["log_one_minus_alphas_cumprod"].expand(x_start.shape)

    def q_sample(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw x_t ~ q(x_t | x_0), eq. 4: like x_start."""
        check_float(x_start, "x_start")
        tables = self._tables.on(x_start)
        signal, sigma = tables["sqrt_alphas_cumprod"], tables["sqrt_one_minus_alphas_cumprod"]
        noise = draw_like(x_start, generator) if noise is None else noise
        return q_sample(x_start, t, signal[:-1], sigma[:-1], noise=noise)[0]

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), eq. 6-7.

        The variance at t = 0 is 0; its logarithm is taken at step 1.
        """
        check_like(x_start, "x_start", x_t, "x_t")
        at = self._tables.at(t, x_t, "x_t")
        return (
            posterior_mean(at, x_start.to(at.dtype), x_t.to(at.dtype)),
            at["posterior_variance"].expand(x_t.shape),
            at["posterior_log_variance_clipped"].expand(x_t.shape),
        )

    # --- p: from noise to data ---

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """p(x_{t-1} | x_t) as {"mean", "variance", "log_variance", "pred_xstart"}, each like x."""
        at = self._tables.at(t, x)
        output = reverse.call_model(self, model, x, at["model_timesteps"].flatten(), model_kwargs)
        return reverse.interpret(self, output, x, at, clip_denoised, denoised_fn)

    @called_with(StepArguments)
    def p_sample(self, given: StepArguments) -> dict[str, Tensor]:
        """Draw x_{t-1} ~ p(x_{t-1} | x_t), DDPM algorithm 2: {"sample", "pred_xstart"}, like x.

        No noise enters where t = 0.
        """
        return step_at(self, "ddpm", given)

    @called_with(DDIMStepArguments)
    def ddim_sample(self, given: DDIMStepArguments) -> dict[str, Tensor]:
        """Draw x_{t-1} with DDIM (Song et al. 2020 eq. 12): {"sample", "pred_xstart"}, like x.

        ``eta`` = 0 is deterministic, 1 has DDPM's posterior variance; one that is negative or so
        large that no room is left for ε raises InputError. ε is taken from the x_0 that clipping
        and ``denoised_fn`` leave.
        """
        return step_at(self, "ddim", given, given.eta)

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
        *,
        cond_fn: reverse.CondFn | None = None,
    ) -> dict[str, Tensor]:
        """x_{t+1} along the deterministic DDIM path, to encode x_0: {"sample", "pred_xstart"}.

        Only eta = 0 has a reverse (InputError otherwise).
        """
        if eta != 0.0:
            raise InputError(f"reverse DDIM is deterministic: eta must be 0, got {eta}")
        options = (clip_denoised, denoised_fn, model_kwargs)
        return step_at(self, "ddim_reverse", StepArguments(model, x, t, *options, cond_fn=cond_fn))

    @called_with(LoopArguments)
    def p_sample_loop(self, given: LoopArguments) -> Tensor:
        """DDPM sampling (Ho et al. 2020 algorithm 2): x_0. Arguments: :class:`LoopArguments`."""
        return last(loop(self, "ddpm", given))

    @called_with(LoopArguments)
    def p_sample_loop_progressive(self, given: LoopArguments) -> Iterator[dict[str, Tensor]]:
        """As :meth:`p_sample_loop`, yielding what ``p_sample`` answers after every step."""
        return loop(self, "ddpm", given)

    @called_with(DDIMLoopArguments)
    def ddim_sample_loop(self, given: DDIMLoopArguments) -> Tensor:
        """DDIM sampling (Song et al. 2020 eq. 12): x_0. Arguments: :class:`DDIMLoopArguments`."""
        return last(loop(self, "ddim", given, given.eta))

    @called_with(DDIMLoopArguments)
    def ddim_sample_loop_progressive(self, given: DDIMLoopArguments) -> Iterator[dict[str, Tensor]]:
        """As :meth:`ddim_sample_loop`, yielding what ``ddim_sample`` answers after every step."""
        return loop(self, "ddim", given, given.eta)

    # --- Losses and likelihood ---

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        step: int | Tensor = 0,
        first_sample: int | Tensor = 0,
    ) -> dict[str, Tensor]:
        """Losses of one timestep per sample, each float32 (N,): {"loss"} and its parts.

        "mse" (of what the network predicts, unweighted) for the mse losses; "vb", the bound's term
        in bits/dim times the loss's own scale, for the kl losses and where a variance is learned.
        loss = weight · mse + vb. The mean is detached in the bound's term of the mse losses
        (Nichol & Dhariwal 2021 section 3.1), and x_0 is never clipped.

        Without ``noise`` it is drawn: by the counter generator where there is a ``seed``, as
        :func:`fastdiff.ops.q_sample` does (sample ``first_sample + i`` at training step ``step``),
        else by torch.
        """
        options = (model_kwargs, noise, generator, Counters(step, seed, first_sample))
        return losses.training_losses(self, model, x_start, t, *options)

    def prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) ‖ N(0, 1)) in bits/dim, (N,): the term that no network changes."""
        return likelihood.prior_bpd(self, x_start)

    _prior_bpd = prior_bpd  # its published name

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
        :func:`fastdiff.process.likelihood.summarize_bpd` averages the result.
        """
        options = (clip_denoised, model_kwargs, noise, generator, progress)
        return likelihood.bpd_loop(self, model, x_start, *options)

    # --- Strides and configuration ---

    def at_log_snr(self, values: npt.ArrayLike) -> "GaussianDiffusion":
        """The process over the levels with these λ = log(signal / noise), in any order.

        Between the steps of the process that this one was taken from (of this one, where it does
        not know that: ``original_betas``), λ is linear in t, and the network is given the t of a
        level, which then is no integer. −inf is the last step where that has no signal. Raises
        InputError for levels beyond the first and the last step, equal ones, and mean_type
        "previous_x": that network's step ends at one of its own levels.
        """
        if self.mean_type == "previous_x":
            raise InputError(
                "mean_type 'previous_x' predicts where a step of its own leads, so it has no "
                "levels between its steps; expected 'epsilon', 'x_start' or 'v'"
            )
        grid = self.grid()
        log_snr = grid.falling(values)
        return self._strided(betas_of_log_snr(log_snr), grid.timesteps_at(log_snr))

    def to_config(self) -> dict[str, Any]:
        """A JSON-serialisable dict from which :meth:`from_config` builds this process again.

        The arguments of ``create_diffusion`` where it came from there, else the constructor's.
        """
        if self._recipe is not None:
            return dict(self._recipe)
        given = self._arguments().items()
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in given}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GaussianDiffusion":
        """The process that :meth:`to_config` described. InputError for anything else."""
        if not isinstance(config, dict):
            raise InputError(f"a diffusion config must be a dict, got {type(config).__name__}")
        try:
            return cls(**config) if "betas" in config else create_diffusion(**config)
        except TypeError as error:
            raise InputError(f"not a diffusion config: {error}") from error

    def _at_steps(
        self, steps: list[int], sections: str | int | Sequence[int] | None
    ) -> "GaussianDiffusion":
        """Its betas are 1 − ᾱ_i / ᾱ_prev (Nichol & Dhariwal 2021 eq. 19)."""
        kept = self.alphas_cumprod[steps]
        betas = 1.0 - kept / np.append(1.0, kept[:-1])
        respaced = self._strided(betas, self.timestep_map[steps])
        # The recipe has a name for sections of the whole process only.
        recipe = self._recipe
        if sections is not None and recipe is not None and not recipe["timestep_respacing"]:
            plain = sections if isinstance(sections, str) else np.asarray(sections).tolist()
            respaced._recipe = recipe | {"timestep_respacing": plain}
        return respaced

    def _strided(self, betas: Float64Array, timestep_map: TimestepMap) -> "GaussianDiffusion":
        """This process over other levels of the same whole one."""
        whole = is_whole(self.timestep_map, self.original_num_steps)
        original = self.betas if whole else self.original_betas
        changes = {"betas": betas, "timestep_map": timestep_map, "original_betas": original}
        return GaussianDiffusion(**self._arguments() | changes)

    def grid(self) -> Grid:
        """λ at the unstrided process's steps and between them."""
        original = self.original_betas
        return Grid.of(self, None if original is None else log_snr_of_betas(original))

    def _arguments(self) -> dict[str, Any]:
        """Of the constructor."""
        names = "betas mean_type var_type loss_type rescale_timesteps loss_weighting min_snr_gamma"
        names += " timestep_map original_num_steps original_betas"
        return {name: getattr(self, name) for name in names.split()}

    def __getstate__(self) -> dict:
        """Copies and pickles leave the step tables behind: they are a cache."""
        return self.__dict__ | {"_step_tables": {}}


def create_diffusion(
    *,
    steps: int = 1000,
    noise_schedule: str = "linear",
    learn_sigma: bool = False,
    sigma_small: bool = False,
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | int | Sequence[int] = "",
    mean_type: str | None = None,
    var_type: str | None = None,
    loss_type: str | None = None,
    loss_weighting: str | None = None,
    min_snr_gamma: float = 5.0,
    zero_terminal_snr: bool = False,
) -> GaussianDiffusion:
    """Build a :class:`GaussianDiffusion` and remember how (``to_config``).

    The first nine options are the published ones; names are for what the flags cannot say.

    Args:
        steps: K, of the process the network is trained on.
        noise_schedule: see :func:`fastdiff.get_named_beta_schedule`.
        learn_sigma: var_type "learned_range"; else it is as ``sigma_small`` says.
        sigma_small: var_type "fixed_small" in place of "fixed_large".
        use_kl: loss_type "rescaled_kl"; else it is as ``rescale_learned_sigmas`` says.
        predict_xstart: mean_type "x_start" in place of "epsilon".
        rescale_timesteps: give the network timesteps scaled to 0 … 1000.
        rescale_learned_sigmas: loss_type "rescaled_mse" in place of "mse".
        timestep_respacing: see :func:`fastdiff.space_timesteps`; "" takes every step.
        mean_type: one of GaussianDiffusion's, in place of ``predict_xstart``.
        var_type: one of its, in place of ``learn_sigma`` and ``sigma_small``.
        loss_type: one of its, in place of ``use_kl`` and ``rescale_learned_sigmas``.
        loss_weighting: None or "min_snr", as GaussianDiffusion's.
        min_snr_gamma: the γ of that weighting.
        zero_terminal_snr: rescale the schedule so that the last step has no signal (Lin et al.
            2023), which ε-prediction does not allow.

    Raises InputError for unknown names, a flag that contradicts one, a respacing that does not fit.
    """
    recipe = dict(locals())  # the arguments
    betas = schedules.get_named_beta_schedule(noise_schedule, steps)
    var_flags = {"learned_range": learn_sigma, "fixed_small": sigma_small}
    loss_flags = {"rescaled_kl": use_kl, "rescaled_mse": rescale_learned_sigmas}
    mean_flags = {"x_start": predict_xstart}
    diffusion = GaussianDiffusion(
        schedules.rescale_zero_terminal_snr(betas) if zero_terminal_snr else betas,
        mean_type=reverse.flagged_choice("mean_type", mean_type, mean_flags, "epsilon"),
        var_type=reverse.flagged_choice("var_type", var_type, var_flags, "fixed_large"),
        loss_type=reverse.flagged_choice("loss_type", loss_type, loss_flags, "mse"),
        rescale_timesteps=rescale_timesteps,
        loss_weighting=loss_weighting,
        min_snr_gamma=min_snr_gamma,
    )
    diffusion._recipe = recipe | {"steps": len(betas), "timestep_respacing": ""}
    return diffusion if timestep_respacing == "" else diffusion.respace(timestep_respacing)

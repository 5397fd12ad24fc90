"""A diffusion object with the interface of improved-diffusion, guided-diffusion and DiT.

Written from the equations (numbers: Ho et al. 2020, Nichol & Dhariwal 2021, Song et al. 2020,
Dhariwal & Nichol 2021), one step after the other, so that tests need no checkout of theirs.
``Improved`` has the arguments of improved-diffusion; ``Guided`` those of guided-diffusion, with
cond_fn in the middle. ``spaced(cls)`` is their SpacedDiffusion.
"""

import enum
import math

import numpy as np
import torch
from torch import Tensor

ModelMeanType = enum.Enum("ModelMeanType", "PREVIOUS_X START_X EPSILON")
ModelVarType = enum.Enum("ModelVarType", "LEARNED FIXED_SMALL FIXED_LARGE LEARNED_RANGE")
LossType = enum.Enum("LossType", "MSE RESCALED_MSE KL RESCALED_KL")


def normal_kl(mean1, logvar1, mean2, logvar2):
    """KL(N(mean1, exp logvar1) ‖ N(mean2, exp logvar2)) in nats."""
    ratio = torch.exp(logvar1 - logvar2)
    return 0.5 * (ratio - 1 - torch.log(ratio) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def normal_cdf(x):
    """The tanh form the published likelihood uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_nll(x, mean, log_std):
    """−log of the mass that N(mean, std) puts on the 1/255-wide bin of x; open at the ends."""
    above = normal_cdf((x - mean + 1 / 255) * torch.exp(-log_std))
    below = normal_cdf((x - mean - 1 / 255) * torch.exp(-log_std))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return -torch.log(mass.clamp(min=1e-12))


def bits(x):
    return x.flatten(1).mean(dim=1) / math.log(2)


class Improved:
    def __init__(
        self, *, betas, model_mean_type, model_var_type, loss_type, rescale_timesteps=False
    ):
        self.model_mean_type, self.model_var_type = model_mean_type, model_var_type
        self.loss_type, self.rescale_timesteps = loss_type, rescale_timesteps
        self.betas = np.array(betas, dtype=np.float64)
        self.num_timesteps = len(self.betas)
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        share = 1 / (1 - self.alphas_cumprod)
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) * share  # eq. 7
        self.posterior_mean_coef1 = self.betas * np.sqrt(self.alphas_cumprod_prev) * share
        self.posterior_mean_coef2 = np.sqrt(1 - self.betas) * (1 - self.alphas_cumprod_prev) * share
        clipped = np.append(self.posterior_variance[1:2], self.posterior_variance[1:])
        self.posterior_log_variance_clipped = np.log(clipped)
        self.fixed_large = np.append(self.posterior_variance[1:2], self.betas[1:])

    def at(self, table, t, x):
        return torch.from_numpy(table)[t.cpu()].to(x).view(-1, *(1,) * (x.dim() - 1))

    def scaled(self, t):
        return t.float() * (1000 / self.num_timesteps) if self.rescale_timesteps else t

    def called(self, function):
        """A model or a cond_fn that may be given this process's own t."""
        return lambda x, t, **kwargs: function(x, self.scaled(t), **kwargs)

    # q

    def q_mean_variance(self, x_start, t):
        alpha = self.at(self.alphas_cumprod, t, x_start)
        variance = (1 - alpha).expand(x_start.shape)
        return alpha.sqrt() * x_start, variance, torch.log(variance)

    def q_sample(self, x_start, t, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        mean, variance, _ = self.q_mean_variance(x_start, t)
        return mean + variance.sqrt() * noise

    def q_posterior_mean_variance(self, x_start, x_t, t):
        mean = self.at(self.posterior_mean_coef1, t, x_t) * x_start
        mean = mean + self.at(self.posterior_mean_coef2, t, x_t) * x_t
        variance = self.at(self.posterior_variance, t, x_t).expand(x_t.shape)
        return (
            mean,
            variance,
            self.at(self.posterior_log_variance_clipped, t, x_t).expand(x_t.shape),
        )

    # p

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        output = self.called(model)(x, t, **(model_kwargs or {}))
        kind, (small, large) = self.model_var_type.name, self.log_variances(t, x)
        if kind.startswith("LEARNED"):
            output, log_variance = output.chunk(2, dim=1)
            if kind == "LEARNED_RANGE":  # eq. 15
                log_variance = (log_variance + 1) / 2 * (large - small) + small
            variance = torch.exp(log_variance)
        elif kind == "FIXED_SMALL":
            log_variance = small.expand(x.shape)
            variance = self.at(self.posterior_variance, t, x).expand(x.shape)
        else:
            variance = self.at(self.fixed_large, t, x).expand(x.shape)
            log_variance = torch.log(variance)
        kind = self.model_mean_type.name
        coef1, coef2 = (
            self.at(table, t, x) for table in (self.posterior_mean_coef1, self.posterior_mean_coef2)
        )
        x_start = output
        if kind == "PREVIOUS_X":
            x_start = (output - coef2 * x) / coef1
        elif kind == "EPSILON":
            x_start = self.xstart_from_eps(x, t, output)
        x_start = x_start if denoised_fn is None else denoised_fn(x_start)
        x_start = x_start.clamp(-1, 1) if clip_denoised else x_start
        mean = output if kind == "PREVIOUS_X" else coef1 * x_start + coef2 * x
        return {
            "mean": mean,
            "variance": variance,
            "log_variance": log_variance,
            "pred_xstart": x_start,
        }

    def log_variances(self, t, x):
        tables = self.posterior_log_variance_clipped, np.log(self.betas)
        return tuple(self.at(table, t, x) for table in tables)

    def xstart_from_eps(self, x, t, eps):
        alpha = self.at(self.alphas_cumprod, t, x.double())
        return (x.double() / alpha.sqrt() - (1 / alpha - 1).sqrt() * eps).to(x.dtype)

    def eps_from_xstart(self, x, t, x_start):
        alpha = self.at(self.alphas_cumprod, t, x.double())
        return ((x.double() - alpha.sqrt() * x_start) / (1 - alpha).sqrt()).to(x.dtype)

    def guided_eps(self, out, x, t, cond_fn, kwargs):
        """Dhariwal & Nichol 2021, algorithm 2."""
        eps = self.eps_from_xstart(x, t, out["pred_xstart"])
        if cond_fn is None:
            return eps, out["pred_xstart"]
        gradient = self.called(cond_fn)(x, t, **(kwargs or {}))
        eps = eps - (1 - self.at(self.alphas_cumprod, t, x)).sqrt() * gradient
        return eps, self.xstart_from_eps(x, t, eps)

    def _p_step(self, model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs):
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = torch.randn_like(x)
        mean = out["mean"]
        if cond_fn is not None:  # algorithm 1
            gradient = self.called(cond_fn)(x, t, **(model_kwargs or {}))
            mean = mean + out["variance"] * gradient
        noise = noise * (t != 0).view(-1, *(1,) * (x.dim() - 1))
        sample = mean + torch.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def _ddim_step(self, model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta):
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        eps, x_start = self.guided_eps(out, x, t, cond_fn, model_kwargs)
        before = self.at(self.alphas_cumprod_prev, t, x)
        std = eta * self.at(self.posterior_variance, t, x).sqrt()  # eq. 16
        sample = before.sqrt() * x_start + (1 - before - std**2).sqrt() * eps  # eq. 12
        noise = torch.randn_like(x) * (t != 0).view(-1, *(1,) * (x.dim() - 1))
        return {"sample": sample + std * noise, "pred_xstart": x_start}

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        return self._p_step(model, x, t, clip_denoised, denoised_fn, None, model_kwargs)

    def ddim_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0
    ):
        return self._ddim_step(model, x, t, clip_denoised, denoised_fn, None, model_kwargs, eta)

    def ddim_reverse_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0
    ):
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        eps = self.eps_from_xstart(x, t, out["pred_xstart"])
        after = self.at(np.append(self.alphas_cumprod[1:], 0.0), t, x)
        sample = after.sqrt() * out["pred_xstart"] + (1 - after).sqrt() * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    # Loops

    def _loop(self, step, model, shape, noise, device):
        device = next(model.parameters()).device if device is None else device
        x = torch.randn(*shape, device=device) if noise is None else noise
        for i in reversed(range(self.num_timesteps)):
            with torch.no_grad():
                out = step(model, x, torch.tensor([i] * shape[0], device=device))
            yield out
            x = out["sample"]

    def p_sample_loop_progressive(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
    ):
        def step(model, x, t):
            return self._p_step(model, x, t, clip_denoised, denoised_fn, None, model_kwargs)

        yield from self._loop(step, model, shape, noise, device)

    def ddim_sample_loop_progressive(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        eta=0.0,
    ):
        def step(model, x, t):
            rest = (clip_denoised, denoised_fn, None, model_kwargs, eta)
            return self._ddim_step(model, x, t, *rest)

        yield from self._loop(step, model, shape, noise, device)

    def p_sample_loop(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
    ):
        given = (noise, clip_denoised, denoised_fn, model_kwargs, device, progress)
        return list(self.p_sample_loop_progressive(model, shape, *given))[-1]["sample"]

    def ddim_sample_loop(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        eta=0.0,
    ):
        given = (noise, clip_denoised, denoised_fn, model_kwargs, device, progress, eta)
        return list(self.ddim_sample_loop_progressive(model, shape, *given))[-1]["sample"]

    # Losses

    def bound_term(self, model, x_start, x_t, t, clip_denoised, model_kwargs=None):
        out = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
        mean, _, log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        kl = bits(normal_kl(mean, log_variance, out["mean"], out["log_variance"]))
        nll = bits(discretized_nll(x_start, out["mean"], 0.5 * out["log_variance"]))
        return torch.where(t == 0, nll, kl), out["pred_xstart"]

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        kind = self.loss_type.name
        if kind in ("KL", "RESCALED_KL"):
            loss, _ = self.bound_term(model, x_start, x_t, t, False, model_kwargs)
            return {"loss": loss * self.num_timesteps if kind == "RESCALED_KL" else loss}
        output = self.called(model)(x_t, t, **(model_kwargs or {}))
        terms = {}
        if self.model_var_type.name.startswith("LEARNED"):
            output, values = output.chunk(2, dim=1)
            frozen = torch.cat([output.detach(), values], dim=1)
            vb, _ = self.bound_term(lambda *_, **__: frozen, x_start, x_t, t, False)
            terms["vb"] = vb * self.num_timesteps / 1000 if kind == "RESCALED_MSE" else vb
        target = {
            "PREVIOUS_X": self.q_posterior_mean_variance(x_start, x_t, t)[0],
            "START_X": x_start,
            "EPSILON": noise,
        }[self.model_mean_type.name]
        terms["mse"] = ((target - output) ** 2).flatten(1).mean(dim=1)
        return terms | {"loss": sum(terms.values())}

    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None):
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for i in reversed(range(self.num_timesteps)):
            t, noise = torch.tensor([i] * len(x_start)), torch.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise)
            with torch.no_grad():
                vb, guess = self.bound_term(model, x_start, x_t, t, clip_denoised, model_kwargs)
            columns["vb"].append(vb)
            columns["xstart_mse"].append(((guess - x_start) ** 2).flatten(1).mean(dim=1))
            eps = self.eps_from_xstart(x_t, t, guess)
            columns["mse"].append(((eps - noise) ** 2).flatten(1).mean(dim=1))
        terms = {name: torch.stack(column, dim=1) for name, column in columns.items()}
        last = torch.tensor([self.num_timesteps - 1] * len(x_start))
        mean, _, log_variance = self.q_mean_variance(x_start, last)
        zero = torch.zeros(())
        terms["prior_bpd"] = bits(normal_kl(mean, log_variance, zero, zero))
        return terms | {"total_bpd": terms["vb"].sum(dim=1) + terms["prior_bpd"]}


class Guided(Improved):
    """cond_fn stands before model_kwargs."""

    def p_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None
    ):
        return self._p_step(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)

    def ddim_sample(
        self,
        model,
        x,
        t,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        eta=0.0,
    ):
        return self._ddim_step(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)

    def p_sample_loop_progressive(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
    ):
        def step(model, x, t):
            return self.p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)

        yield from self._loop(step, model, shape, noise, device)

    def ddim_sample_loop_progressive(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        eta=0.0,
    ):
        def step(model, x, t):
            rest = (clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)
            return self.ddim_sample(model, x, t, *rest)

        yield from self._loop(step, model, shape, noise, device)

    def p_sample_loop(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
    ):
        given = (noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress)
        return list(self.p_sample_loop_progressive(model, shape, *given))[-1]["sample"]

    def ddim_sample_loop(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        eta=0.0,
    ):
        given = (noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta)
        return list(self.ddim_sample_loop_progressive(model, shape, *given))[-1]["sample"]


def spaced(base):
    """Their SpacedDiffusion over ``base``: takes ``use_timesteps`` and the whole process's betas,
    hands arguments on as *args, and gives models the timesteps of the whole process."""

    class SpacedDiffusion(base):
        def __init__(self, use_timesteps, **kwargs):
            whole = np.cumprod(1 - np.array(kwargs["betas"], dtype=np.float64))
            self.timestep_map = sorted(use_timesteps)
            self.original_num_steps = len(whole)
            kept = whole[self.timestep_map]
            super().__init__(**kwargs | {"betas": 1 - kept / np.append(1.0, kept[:-1])})

        def scaled(self, t):
            t = torch.tensor(self.timestep_map, device=t.device)[t]
            return t.float() * (1000 / self.original_num_steps) if self.rescale_timesteps else t

        def p_mean_variance(self, model, *args, **kwargs):
            return super().p_mean_variance(model, *args, **kwargs)

        def training_losses(self, model, *args, **kwargs):
            return super().training_losses(model, *args, **kwargs)

    return SpacedDiffusion

"""Calls of k-diffusion's samplers, and what they gave: recorded by

    python tests/tools/k_diffusion_cases.py CHECKOUT tests/recorded/k_diffusion.npz

from a checkout of github.com/crowsonkb/k-diffusion (commit 4601bf0), in float64 (σ too, where the
sampler chooses it) but for what draws by torch.randn_like, which is in float32.
"""

import sys
import types

import numpy as np
import torch

SHAPE = (2, 3, 4, 4)
KARRAS = [(80 ** (1 / 7) + i / 7 * (0.05 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(8)]
SIGMAS = {"zero": [*KARRAS, 0.0], "part": [14.6, 7.0, 3.1, 1.2, 0.4], "once": [2.5, 0.0]}
CHURN = {"s_churn": 3.0, "s_tmin": 0.1, "s_tmax": 50.0, "s_noise": 1.05}
ENDS = (0.05, 80.0)
CONTROL = ("error", "h", "steps", "nfe", "n_accept", "n_reject")
NOISY = (
    *("sample_euler_ancestral", "sample_dpm_2_ancestral", "sample_dpmpp_2s_ancestral"),
    *("sample_dpmpp_sde", "sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"),
)


def cases():
    """(name of the case, sampler, σ, its options, whether it draws by itself)"""
    for ends, sigmas in SIGMAS.items():
        for name in ("sample_euler", "sample_heun", "sample_dpm_2"):
            yield f"{name} {ends}", name, sigmas, {}, True
            yield f"{name} {ends} churn", name, sigmas, CHURN, True
        yield f"sample_dpmpp_2m {ends}", "sample_dpmpp_2m", sigmas, {}, False
        for order in (1, 2, 3, 4):
            yield f"sample_lms {ends} {order}", "sample_lms", sigmas, {"order": order}, False
        # k-diffusion's own multistep SDEs cannot have the only step lead to 0.
        for name in NOISY[: 4 if ends == "once" else None]:
            for eta in (0.0, 0.6, 1.0):
                options = {"eta": eta, "s_noise": 1.1}
                yield f"{name} {ends} {eta}", name, sigmas, options, False
    options = {"eta": 0.8, "solver_type": "heun"}
    yield "sample_dpmpp_2m_sde heun", "sample_dpmpp_2m_sde", SIGMAS["zero"], options, False


def solver_cases():
    """(name of the case, sampler, its options, whether it draws by itself), of those samplers that
    choose their σ themselves: between ENDS, unless the options have others"""
    up = {"sigma_min": 30.0, "sigma_max": 0.3}
    for n in range(1, 9):
        yield f"sample_dpm_fast {n}", "sample_dpm_fast", {"n": n}, False
    for n, eta in ((3, 1.0), (4, 0.6), (5, 1.4)):
        options = {"n": n, "eta": eta, "s_noise": 1.1}
        yield f"sample_dpm_fast {n} {eta}", "sample_dpm_fast", options, False
    yield "sample_dpm_fast up", "sample_dpm_fast", {"n": 6, **up}, False
    yield "sample_dpm_fast drawn", "sample_dpm_fast", {"n": 7, "eta": 0.6}, True
    adaptive = {
        "default": {},
        "tight": {"rtol": 0.002, "atol": 1e-4, "h_init": 2.0},
        "pid": {"pcoeff": 0.2, "icoeff": 0.6, "dcoeff": 0.1, "h_init": 1.5, "rtol": 0.01},
        "lenient": {"accept_safety": 0.3, "h_init": 3.0},
        "eta": {"eta": 0.7, "s_noise": 1.1, "rtol": 0.02},
        "most": {"eta": 1.4, "h_init": 1.0},
        "up": {**up, "h_init": 0.8},
        "drawn": {"eta": 0.6},
    }
    sampler = "sample_dpm_adaptive"
    for order in (2, 3):
        for name, options in adaptive.items():
            draws = name == "drawn"
            yield f"{sampler} {order} {name}", sampler, {"order": order, **options}, draws


def start(sigmas, dtype):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (x * sigmas[0]).to(dtype)


def model(x, sigma, *, strength=1.0):
    """A denoiser whose x_0 bends with x and σ."""
    sigma = sigma.view(-1, *[1] * (x.dim() - 1))
    return strength * torch.tanh(
        0.9 * x / (1 + sigma**2) ** 0.5 + 0.1 * x.roll(1, -1) / (1 + sigma)
    )


def noise_sampler(sigma, sigma_next):
    """Noise that follows from where it is asked for, so that a wrong level shows."""
    base = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    turn = float(torch.as_tensor(sigma).double().log()) * 3
    turn += float(torch.as_tensor(sigma_next).double().log()) * 5
    return base * np.cos(turn) + base.flip(0) * np.sin(turn)


def answers(samplers, case, dtype):
    """x and what the callback saw, of a module with k-diffusion's names."""
    _, name, sigmas, options, draws = case
    seen = []
    torch.manual_seed(3)
    sampler = {} if draws or name not in NOISY else {
        "noise_sampler": lambda *levels: noise_sampler(*levels).to(dtype)
    }  # fmt: skip
    x = getattr(samplers, name)(
        model,
        start(sigmas, dtype),
        torch.tensor(sigmas, dtype=dtype),
        extra_args={"strength": 0.9},
        callback=seen.append,
        disable=True,
        **sampler,
        **options,
    )
    return x, seen


def solver_answers(samplers, case, dtype):
    """The same of a case of ``solver_cases``."""
    _, name, options, draws = case
    seen = []
    torch.manual_seed(3)
    options = dict(zip(("sigma_min", "sigma_max"), ENDS, strict=True)) | options
    sampler = {} if draws else {
        "noise_sampler": lambda *levels: noise_sampler(*levels).to(dtype)
    }  # fmt: skip
    x = getattr(samplers, name)(
        model,
        start([options["sigma_max"]], dtype),
        extra_args={"strength": 0.9},
        callback=seen.append,
        disable=True,
        **sampler,
        **options,
    )
    return x, seen


def record(checkout, path):
    for missing in ("torchdiffeq", "torchsde"):
        sys.modules[missing] = types.SimpleNamespace(odeint=None)
    package = sys.modules["k_diffusion"] = types.ModuleType("k_diffusion")
    package.__path__ = [f"{checkout}/k_diffusion"]
    package.utils = types.SimpleNamespace(
        append_dims=lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]
    )
    from k_diffusion import sampling

    recorded = {}
    for case in cases():
        x, seen = answers(sampling, case, torch.float32 if case[-1] else torch.float64)
        recorded[case[0]] = x.double().numpy()
        levels = [[float(call["sigma"]), float(call["sigma_hat"])] for call in seen]
        recorded[f"{case[0]} levels"] = np.array(levels)
        recorded[f"{case[0]} denoised"] = np.array([float(call["denoised"].sum()) for call in seen])
    for case in solver_cases():
        dtype = torch.float32 if case[-1] else torch.float64
        torch.set_default_dtype(dtype)  # that of σ
        x, seen = solver_answers(sampling, case, dtype)
        recorded[case[0]] = x.double().numpy()
        recorded[f"{case[0]} levels"] = np.array([float(call["sigma"]) for call in seen])
        recorded[f"{case[0]} denoised"] = np.array([float(call["denoised"].sum()) for call in seen])
        if "error" in seen[0]:
            control = [[float(call[name]) for name in CONTROL] for call in seen]
            recorded[f"{case[0]} control"] = np.array(control)
    np.savez_compressed(path, **recorded)


if __name__ == "__main__":
    record(*sys.argv[1:])

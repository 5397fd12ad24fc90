"""Measured timesteps: of closed-form networks, within their budget, and as a file."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from fastdiff.errors import InputError
from fastdiff.process.edm import EDM
from fastdiff.process.gaussian import create_diffusion
from fastdiff.process.variance_exploding import VarianceExploding, geometric_sigmas
from fastdiff.sampling.measured_timesteps import measured_timesteps
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.timesteps_file import MeasuredTimesteps

MEANS = torch.tensor([[-0.8, 0.3], [0.6, 0.7], [0.2, -0.6]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
STD = 0.08

PROCESSES = {
    "linear": create_diffusion(steps=1000),
    "cosine": create_diffusion(steps=200, noise_schedule="cosine", mean_type="v"),
    "zero terminal SNR": create_diffusion(steps=200, mean_type="x_start", zero_terminal_snr=True),
    "ve": VarianceExploding(geometric_sigmas(200), scale_input=False),
    "edm": EDM(200),
}


class Mixture:
    """E[x_0 | x_t] of a mixture of three Gaussians in the plane, as a process's network says it."""

    def __init__(self, process):
        self.process, self.grid, self.calls = process, process.grid(), 0

    def levels(self, t):
        """(signal, noise) at a timestep that the network is given."""
        if isinstance(self.process, EDM):
            return 1.0, np.exp(4 * t)
        log_snr = self.grid.log_snr_at(np.array([t]).clip(0, self.grid.timesteps[-1]))[0]
        if isinstance(self.process, VarianceExploding):
            return 1.0, np.exp(-log_snr)
        return np.exp(-0.5 * np.logaddexp(0, [-2 * log_snr, 2 * log_snr]))

    def __call__(self, x, t):
        self.calls += 1
        signal, noise = self.levels(float(t[0]))
        x = x.double()
        if isinstance(self.process, EDM):
            x = x * np.hypot(noise, self.process.sigma_data)
        variance = (signal * STD) ** 2 + noise**2
        off = x[:, None] - signal * MEANS
        share = torch.softmax(WEIGHTS.log() - off.square().sum(-1) / (2 * variance), dim=1)
        means = MEANS + signal * STD**2 / variance * off
        return self.answer(x, (share[..., None] * means).sum(1), signal, noise).float()

    def answer(self, x, x_start, signal, noise):
        if self.process.mean_type == "x_start":
            return x_start
        if self.process.mean_type == "edm":
            data = self.process.sigma_data
            total = np.hypot(noise, data)
            return (x_start - (data / total) ** 2 * x) * total / (noise * data)
        eps = (x - signal * x_start) / noise
        return eps if self.process.mean_type == "epsilon" else signal * eps - noise * x_start


def measured(process, steps=6, *, budget=560, **arguments):
    network = Mixture(process)
    options = {"shape": (32, 2), "fine_steps": 200, "clip_denoised": False}
    found = measured_timesteps(network, process, steps, budget=budget, **options | arguments)
    return found, network


def errors_elsewhere(process, method, *choices):
    """Of each choice of timesteps, for 200 other x_T than were searched with, against 400 steps."""
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(1)) * process.prior_std
    sampler = Sampler(Mixture(process), process, method=method, clip_denoised=False)
    fine = process.respace(400, spacing="exponential")
    solver = Sampler(sampler.model, fine, method="dpmsolver++", clip_denoised=False)
    solution = solver.sample(noise.shape, noise=noise)
    for timesteps in choices:
        mine = sampler.configure(timesteps=timesteps).sample(noise.shape, noise=noise)
        yield (mine - solution).double().square().mean().sqrt().item()


@pytest.mark.seconds
@pytest.mark.parametrize("method", ["dpmsolver++", "ddim"])
@pytest.mark.parametrize("name", PROCESSES)
def test_they_are_nearer_than_any_spacing(name, method):
    process = PROCESSES[name]
    found, network = measured(process, method=method)
    assert len(found.timesteps) == 6 and (np.diff(found.timesteps) > 0).all()
    assert found.timesteps[-1] == process.num_timesteps - 1 and found.timesteps[0] >= 0
    assert found.calls == network.calls <= 560
    assert {"uniform", "karras", "exponential"} <= found.by_spacing.keys()
    assert found.error < 0.99 * min(found.by_spacing.values())
    spaced = [
        process.respace(6, spacing=spacing).timestep_map.tolist()
        for spacing in ("uniform", "logsnr", "karras")
    ]
    mine, *others = errors_elsewhere(process, method, found.timesteps, *spaced)
    assert mine < min(others)


def test_the_error_is_that_of_the_samples():
    process = PROCESSES["linear"]
    found, network = measured(process, budget=250)
    noise = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    options = {"method": "dpmsolver++", "clip_denoised": False}
    fine = process.respace(200, spacing="exponential")
    solution = Sampler(network, fine, **options).sample((32, 2), noise=noise)
    for timesteps, error in [
        (found.timesteps, found.error),
        (process.respace(6).timestep_map, found.by_spacing["uniform"]),
        (process.respace(6, spacing="karras").timestep_map, found.by_spacing["karras"]),
    ]:
        sampler = Sampler(network, process, timesteps=list(timesteps), **options)
        samples = sampler.sample((32, 2), noise=noise)
        difference = (samples - solution).double().square().mean().sqrt().item()
        assert difference == pytest.approx(error, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("budget", [206, 207, 229, 230, 231, 300, 413])
def test_the_budget_is_kept_and_used(budget):
    """200 calls for the solution, 6 a trial: as many whole trials as there is room for."""
    seen = []
    found, network = measured(
        PROCESSES["linear"],
        budget=budget,
        progress=lambda *values: seen.append(values),
    )
    assert network.calls == found.calls == 200 + 6 * ((budget - 200) // 6) == seen[-1][0]
    assert [calls for calls, _ in seen] == list(range(206, budget + 1, 6))
    errors = [error for _, error in seen]
    assert errors == sorted(errors, reverse=True) and errors[-1] == found.error
    assert len(found.by_spacing) == min(5, len(seen))


def test_a_seed_finds_the_same_and_another_other_timesteps():
    first, again, other = (
        measured(PROCESSES["cosine"], 4, budget=300, seed=seed)[0] for seed in (3, 3, 4)
    )
    assert first == again and first.timesteps != other.timesteps


def test_it_ends_where_no_move_helps():
    found, network = measured(PROCESSES["cosine"], 2, budget=100_000, fine_steps=50)
    assert found.calls == network.calls < 1000


def test_rounded_they_are_whole_steps():
    found, _ = measured(PROCESSES["linear"], rounded=True)
    assert all(step == int(step) for step in found.timesteps) and len(set(found.timesteps)) == 6
    assert found.error < 0.85 * min(found.by_spacing.values())
    process = PROCESSES["linear"].respace(timesteps=found.timesteps)
    assert process.timestep_map.dtype == np.int64
    every, _ = measured(create_diffusion(steps=30), 30, budget=300, fine_steps=30, rounded=True)
    assert every.timesteps == list(range(30))


def test_a_strided_process_is_searched_in_its_own_steps():
    strided = PROCESSES["linear"].respace(timesteps=[0, 100, 300, 700, 999])
    found, _ = measured(strided, 4, budget=400)
    assert 0 <= found.timesteps[0] and found.timesteps[-1] == 4
    whole = strided.respace(timesteps=found.timesteps).timestep_map
    assert whole[-1] == pytest.approx(999, rel=1e-12) and (np.diff(whole) > 0).all()


def test_guidance_takes_its_arguments():
    labels = []

    class Labelled(Mixture):
        def __call__(self, x, t, y):
            labels.append(y.tolist())
            return super().__call__(x, t) * (1 + 0.1 * y[:, None])

    process = PROCESSES["linear"]
    y = torch.ones(4, dtype=torch.int64)
    found = measured_timesteps(
        Labelled(process),
        process,
        3,
        shape=(4, 2),
        budget=60,
        fine_steps=30,
        guidance_scale=2.0,
        model_kwargs={"y": y},
        uncond_kwargs={"y": 0 * y},
    )
    assert found.calls == len(labels) == 60
    assert all(sorted(row) == [0, 0, 0, 0, 1, 1, 1, 1] for row in labels)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_file_is_what_was_found(name, tmp_path):
    process = PROCESSES[name]
    found, _ = measured(process, 3, budget=100, fine_steps=50)
    path = tmp_path / "made" / "timesteps.json"
    found.save(path)
    read = MeasuredTimesteps.load(path)
    assert read == found and json.loads(path.read_text())["method"] == "dpmsolver++"
    again = type(process).from_config(json.loads(json.dumps(process.to_config())))
    assert read.of_process(again, "dpmsolver++") == found.timesteps
    sampler = Sampler(Mixture(process), process, timesteps=read.timesteps)
    assert len(sampler.table) == 3


def test_a_file_of_another_process_or_method_is_refused(tmp_path):
    found, _ = measured(PROCESSES["linear"], 3, budget=100, fine_steps=50)
    others = [
        create_diffusion(steps=1000, noise_schedule="cosine"),
        create_diffusion(steps=500),
        create_diffusion(steps=1000, timestep_respacing="500"),
        EDM(1000),
        VarianceExploding(geometric_sigmas(1000)),
    ]
    for other in others:
        with pytest.raises(InputError, match="measured for a GaussianDiffusion of 1000") as caught:
            found.of_process(other, "dpmsolver++")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="for method 'dpmsolver\\+\\+', not for 'ddim': take"):
        found.of_process(PROCESSES["linear"], "ddim")
    others = {"timesteps": None}, {"signal_scale": "all"}, {"noise_scale": found.noise_scale[1:]}
    damaged = [json.dumps(asdict(found) | other) for other in others]
    for text in ("", "{}", "[1, 2]", "{'a'", '{"timesteps": [1]}', *damaged):
        path = tmp_path / "timesteps.json"
        path.write_text(text)
        with pytest.raises(InputError, match="holds no measured timesteps; expected a file"):
            MeasuredTimesteps.load(path)
    with pytest.raises(InputError, match="cannot read .*: No such file"):
        MeasuredTimesteps.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 1}, "steps is 1; expected an integer, 2 or more, to have a choice"),
        ({"steps": 2.5}, "steps is 2.5; expected an integer"),
        ({"budget": 205}, "budget is 205 network calls; the fine solution takes 200 and a trial 6"),
        ({"budget": 0}, "expected at least 206"),
        ({"method": "ddpm"}, "method 'ddpm' draws noise, so that its samples have no solution"),
        ({"method": "ddim", "eta": 0.5}, "method 'ddim' draws noise"),
        ({"shape": (4,)}, r"shape is \(4,\); expected"),
        ({"process": object()}, "is no diffusion process"),
        ({"steps": 300, "rounded": True}, "cannot choose 300 of 200 steps"),
    ],
)
def test_what_cannot_be_measured(arguments, message):
    process = PROCESSES["cosine"]
    given = {"process": process, "steps": 6, "shape": (4, 2), "budget": 1000} | arguments
    with pytest.raises(InputError, match=message) as caught:
        measured_timesteps(Mixture(process), **given)
    assert "\n" not in str(caught.value)

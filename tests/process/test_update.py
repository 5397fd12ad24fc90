"""One engine for a step: the published loops, the single steps and Sampler apply the same rows."""

import inspect

import pytest
import torch

from diffusion_tools import gaussian, images
from fastdiff import GaussianDiffusion, Sampler, StepTable, create_diffusion
from fastdiff.process import update
from fastdiff.process.update import at_row, columns_at

SHAPE = (3, 2, 4, 4)
LOOPS = {"p_sample_loop": "ddpm", "ddim_sample_loop": "ddim"}


def process(**types):
    return create_diffusion(steps=100, timestep_respacing="6", **types)


def network(diffusion):
    def model(x, t):
        output = torch.tanh(x) * (0.6 + 0.4 * torch.cos(t.to(x.dtype) / 100).view(-1, 1, 1, 1))
        return torch.cat([output, torch.sin(3 * x)], dim=1) if diffusion.learns_variance else output

    return model


def gradient(x, t):
    return 0.3 * x + t.to(x.dtype).view(-1, 1, 1, 1) / 100


@pytest.fixture
def fused(monkeypatch):
    """Counts the fused steps."""
    calls = []

    def counted(x_t, model_output, table, step, **given):
        calls.append(step)
        return posterior_step(x_t, model_output, table, step, **given)

    posterior_step = update.posterior_step
    monkeypatch.setattr(update, "posterior_step", counted)
    return calls


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize(
    "options",
    [{}, {"denoised_fn": torch.sin}, {"clip_denoised": False}, {"cond_fn": gradient}],
)
def test_loops_run_fused_steps_and_are_samplers_to_the_bit(fused, name, options):
    diffusion = process(learn_sigma=True)
    x_T, z = gaussian(*SHAPE), gaussian(*SHAPE, seed=2)
    loop = getattr(diffusion, name)(network(diffusion), SHAPE, x_T, step_noise=z, **options)
    assert fused == list(range(6))
    sampler = Sampler(network(diffusion), diffusion, method=LOOPS[name], **options)
    assert torch.equal(loop, sampler.sample(SHAPE, noise=x_T, step_noise=z))
    assert fused == 2 * list(range(6))


def test_which_single_steps_are_fused(fused):
    diffusion, x = process(), images(*SHAPE)
    model, same = network(diffusion), torch.full((3,), 4)
    for step in (diffusion.p_sample, diffusion.ddim_sample, diffusion.ddim_reverse_sample):
        step(model, x, same)
        assert fused == [1]
        step(model, x, torch.tensor([4, 4, 2]))  # a row for each sample
        step(model, x.double(), same)  # which no kernel computes in
        assert fused == [1]
        fused.clear()


@pytest.mark.parametrize("mean_type", ["epsilon", "x_start", "v", "previous_x"])
@pytest.mark.parametrize("var_type", ["fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("options", [{}, {"denoised_fn": torch.sin}, {"cond_fn": gradient}])
def test_samples_at_timesteps_of_their_own_are_the_fused_steps_of_each(
    mean_type, var_type, options
):
    diffusion = process(mean_type=mean_type, var_type=var_type)
    model, x, t = network(diffusion), images(*SHAPE), torch.tensor([0, 5, 2])
    noise = gaussian(*SHAPE)
    for name, given in (
        ("p_sample", {"noise": noise}),
        ("ddim_sample", {"noise": noise, "eta": 0.5}),
        ("ddim_reverse_sample", {}),
    ):
        step = getattr(diffusion, name)
        mixed = step(model, x, t, **given, **options)
        exact = (
            step(
                model,
                x.double(),
                t,
                **{k: v.double() if k == "noise" else v for k, v in given.items()},
            )
            if not options
            else None
        )
        for i in range(3):
            one = {k: v[i : i + 1] if k == "noise" else v for k, v in given.items()}
            alone = step(model, x[i : i + 1], t[i : i + 1], **one, **options)
            for part, value in alone.items():
                torch.testing.assert_close(mixed[part][i], value[0], rtol=1e-5, atol=1e-5)
                if exact is not None:
                    torch.testing.assert_close(
                        exact[part][i].float(), value[0], rtol=1e-4, atol=1e-4
                    )


def test_a_row_outside_of_the_table_is_nan_where_nobody_may_look():
    """What a GPU computes for a bad t, exercised on the CPU."""
    table, x = StepTable.from_process(process()), torch.zeros(4, 1, 2)
    rows = torch.tensor([-1, 0, 5, 6])
    values = at_row(table.timesteps, rows, x)
    assert values.shape == (4, 1, 1)
    assert values.flatten().isnan().tolist() == [True, False, False, True]
    columns = columns_at(table, rows, x)
    assert torch.equal(columns["a"][1:3].flatten(), table.a[[0, 5]])
    assert columns["clip"].flatten().isnan().tolist() == [True, False, False, True]


def test_signatures_that_methods_share_are_explicit():
    def names(function):
        parameters = list(inspect.signature(function).parameters.values())
        keyword_only = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        return [p.name for p in parameters if p.name not in keyword_only], keyword_only

    single = ["self", "model", "x", "t", "clip_denoised", "denoised_fn", "model_kwargs"]
    loop = ["self", "model", "shape", "noise", "clip_denoised", "denoised_fn", "model_kwargs"]
    loop += ["device", "progress"]
    extra = ["cond_fn", "generator"]
    for form in ("", "_progressive"):
        ddpm = getattr(GaussianDiffusion, f"p_sample_loop{form}")
        ddim = getattr(GaussianDiffusion, f"ddim_sample_loop{form}")
        assert names(ddpm) == (loop, ["step_noise", *extra])
        assert names(ddim) == ([*loop, "eta"], ["step_noise", *extra])
    assert names(GaussianDiffusion.p_sample) == (single, ["noise", *extra])
    assert names(GaussianDiffusion.ddim_sample) == ([*single, "eta"], ["noise", *extra])
    given = ["seed", "first_sample", "noise", "image", "strength", "known", "known_mask"]
    given += ["model_kwargs", "uncond_kwargs", "cond_kwargs", "step_noise"]
    assert names(Sampler.iterate) == (["self", "shape"], given)
    assert names(Sampler.sample) == (["self", "shape"], [*given, "progress", "callback"])
    parameters = inspect.signature(Sampler.sample).parameters
    assert (parameters["seed"].default, parameters["strength"].default) == (0, 0.8)
    assert inspect.signature(Sampler.sample).return_annotation is torch.Tensor
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        process().p_sample_loop(lambda x, t: x, SHAPE, colour=3)

"""Any network and any process through Trainer: trained, resumed bit for bit, loaded, sampled."""

import itertools
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff import EDM, UNet, VarianceExploding, create_diffusion
from fastdiff.errors import InputError
from fastdiff.process.edm import karras_sigmas
from fastdiff.process.losses import LOSS_TYPES
from fastdiff.training import TrainConfig, Trainer
from network_tools import Plain, SmallDiT, diffusers_unet
from training_tools import at_step, read_lines

SETTINGS = {"batch_size": 4, "steps": 4, "lr": 1e-2, "ema": (0.5,), "save_every": 2}
SETTINGS |= {"log_every": 3, "tensorboard": False}


def cosine(**changes: Any) -> Any:
    return create_diffusion(steps=8, noise_schedule="cosine", **changes)


def unet(**changes: Any) -> UNet:
    options = {"channel_mult": (1,), "norm_num_groups": 8, "dropout": 0.1, **changes}
    return UNet(1, 8, 1, 1, (), **options)


def floats(*shape: int) -> list[Tensor]:
    return list(torch.randn(6, *shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1))


def pictures() -> Tensor:
    whole = torch.Generator().manual_seed(0)
    return torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8, generator=whole)


def labelled() -> list[tuple[Tensor, int]]:
    return [(x, i % 3) for i, x in enumerate(pictures())]


def with_low_res() -> list[dict[str, Tensor]]:
    return [{"x": x, "low_res": x[:, ::2, ::2]} for x in pictures()]


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """The same weights each time, none of them silent as published initialisations have it."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def trainer_of(run, make, process, data, **settings) -> Trainer:
    config = TrainConfig(**{**SETTINGS, **settings})
    return Trainer(made(make), process, data, config, run, device="cpu", progress=False)


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    averages = {f"ema.{n}": v for n, v in trainer.ema.state_dict(0.5).items()}
    return {**trainer.model.state_dict(), **averages}


def trained_and_resumed(tmp_path, make, process, data, model=None, **settings) -> Any:
    """The checkpoint of a run that was interrupted, which is that of one that was not."""
    whole = trainer_of(tmp_path / "whole", make, process, data, **settings)
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.fit()
    trainer_of(tmp_path / "half", make, process, data, **{**settings, "steps": 2}).fit()
    resumed = Trainer.resume(
        tmp_path / "half", data, model=model, changes={"steps": 4}, device="cpu", progress=False
    )
    resumed.fit()
    found, expected = state_of(resumed), state_of(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    weights = [name for name, _ in whole.model.named_parameters()]
    assert any(not torch.equal(expected[name], before[name]) for name in weights)
    return fastdiff.load(tmp_path / "half", model=model)


def sampled(checkpoint, x: Tensor, steps: int = 3, **kwargs: Tensor) -> Tensor:
    sampler = fastdiff.Sampler(
        checkpoint.model,
        checkpoint.diffusion,
        steps=steps,
        method="ddim",
        self_condition=checkpoint.info.get("self_condition"),
    )
    samples = sampler.sample((2, *x.shape), seed=0, model_kwargs=kwargs)
    assert samples.shape == (2, *x.shape) and torch.isfinite(samples).all()
    return samples


LABELS = {"y": torch.tensor([0, 2])}
NETWORKS = {
    "1-D": (partial(unet, dims=1), floats(1, 16), {}),
    "2-D": (unet, pictures(), {}),
    "3-D": (partial(unet, dims=3), floats(1, 2, 4, 4), {}),
    "super-resolution": (
        partial(unet, super_res=True),
        with_low_res(),
        {"low_res": torch.zeros(2, 1, 4, 4)},
    ),
    "diffusers": (diffusers_unet, pictures(), {}),
    "diffusers with classes": (
        partial(diffusers_unet, num_class_embeds=3),
        labelled(),
        {"class_labels": LABELS["y"]},
    ),
    "DiT": (SmallDiT, labelled(), LABELS),
}


@pytest.mark.seconds
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_trained_resumed_loaded_and_sampled(tmp_path, name):
    make, data, kwargs = NETWORKS[name]
    settings = {"label_dropout": 0.3} if name == "DiT" else {}
    checkpoint = trained_and_resumed(tmp_path, make, cosine(), data, **settings)
    assert type(checkpoint.model) is type(make())
    item = data[0]
    x = item["x"] if isinstance(item, dict) else item[0] if isinstance(item, tuple) else item
    sampled(checkpoint, x, **kwargs)


@pytest.mark.seconds
def test_a_module_without_a_config_is_given(tmp_path):
    process = cosine()
    checkpoint = trained_and_resumed(tmp_path, Plain, process, pictures(), model=Plain)
    sampled(checkpoint, pictures()[0])
    for read in (
        partial(Trainer.resume, tmp_path / "half"),
        partial(begun_from, tmp_path / "half"),
    ):
        with pytest.raises(InputError, match=r"holds the weights of a Plain .*model=\.\.\."):
            read(pictures())
    begun_from(tmp_path / "half", pictures(), run=tmp_path / "new", model=Plain).fit()
    with pytest.raises(InputError, match="another network"):
        Trainer.resume(tmp_path / "half", pictures(), model=partial(Plain, width=4))


def begun_from(source, data, run="unused", **options) -> Trainer:
    config = TrainConfig(**{**SETTINGS, "steps": 1})
    return Trainer.from_checkpoint(
        source, data, config, run, weights="model", device="cpu", progress=False, **options
    )


def gaussian(loss_type: str) -> Any:
    learned = {"learn_sigma": True} if loss_type != "mse" else {}
    return cosine(loss_type=loss_type, **learned)


PROCESSES = {
    **{loss: partial(gaussian, loss) for loss in LOSS_TYPES},
    **{
        mean_type: partial(cosine, mean_type=mean_type)
        for mean_type in ("x_start", "v", "previous_x")
    },
    "VE": lambda: VarianceExploding(karras_sigmas(8, 0.02, 10.0)),
    "VE v": lambda: VarianceExploding(karras_sigmas(8, 0.02, 10.0), mean_type="v"),
    "EDM": lambda: EDM(8),
}


class Conditioned(nn.Module):
    """Plain given its own x_0; ``learned`` twice the channels."""

    def __init__(self, learned: bool = False):
        super().__init__()
        self.config = {"learned": learned}
        self.body = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Dropout(0.1))
        self.out = nn.Conv2d(8, 2 if learned else 1, 3, padding=1)
        self.given: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        x_self_cond = torch.zeros_like(x) if x_self_cond is None else x_self_cond
        self.given.append(x_self_cond)
        return self.out(self.body(torch.cat([x, x_self_cond], 1))) + t.view(-1, 1, 1, 1) / 1e4


ITS_OWN = ("mse", "rescaled_kl", "v", "previous_x", "VE", "EDM")
CASES = [(name, "") for name in PROCESSES] + [(name, "x_self_cond") for name in ITS_OWN]


@pytest.mark.seconds
@pytest.mark.parametrize(("name", "self_condition"), CASES)
def test_a_process_is_trained_resumed_loaded_and_sampled(tmp_path, name, self_condition):
    process = PROCESSES[name]()
    make = partial(Conditioned, getattr(process, "learns_variance", False))
    settings = {"self_condition": self_condition, "microbatch": 3}
    checkpoint = trained_and_resumed(tmp_path, make, process, pictures(), **settings)
    assert checkpoint.diffusion.to_config() == process.to_config()
    sampled(checkpoint, pictures()[0])


# Self-conditioning


class Oracle(nn.Module):
    """Answers what a perfect network would for the only picture there is: ``x_0``, constant."""

    def __init__(self, process: Any, x_0: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.process, self.x_0, self.given = process, x_0, []

    def forward(self, x: Tensor, t: Tensor, own: Tensor) -> Tensor:
        self.given.append(own)
        return self.scale * self._answer(x.double(), t).float()

    def _answer(self, x: Tensor, t: Tensor) -> Tensor:
        process = self.process
        if process.mean_type == "x_start":
            return torch.full_like(x, self.x_0)
        if process.continuous:
            sigma = torch.exp(4 * t.double()).view(-1, 1, 1, 1)
            total = (sigma**2 + process.sigma_data**2) ** 0.5
            c_skip, c_out = (process.sigma_data / total) ** 2, sigma * process.sigma_data / total
            return (self.x_0 - c_skip * x * total) / c_out
        scales = (process.input_scale, process.signal_scale, process.noise_scale)
        input_scale, signal, noise = (
            torch.from_numpy(s)[t.long()].view(-1, 1, 1, 1) for s in scales
        )
        return (x / input_scale - signal * self.x_0) / noise


@pytest.mark.parametrize("name", ["epsilon", "x_start", "VE", "EDM"])
def test_the_estimate_is_that_of_x_0(tmp_path, name):
    """A network that knows x_0 is given x_0 in half of the steps, zeros in the others."""
    process = cosine() if name == "epsilon" else PROCESSES[name]()
    oracle = Oracle(process, 0.25)
    data = [torch.full((1, 4, 4), 0.25)] * 4
    settings = {**SETTINGS, "steps": 12, "lr": 1e-12, "self_condition": "own", "save_every": 0}
    trainer = Trainer(
        oracle, process, data, TrainConfig(**settings), tmp_path, device="cpu", progress=False
    )
    for step in range(1, 13):
        at_step(trainer, step, lambda: passes.append(len(oracle.given)))
    passes: list[int] = []
    trainer.fit()
    counts = [after - before for before, after in itertools.pairwise([*passes, len(oracle.given)])]
    assert set(counts) == {1, 2} and 3 <= counts.count(2) <= 9
    assert trainer.self_condition is not None
    assert [count == 2 for count in counts] == [
        trainer.self_condition.estimates(i) for i in range(12)
    ]
    for first, count in zip(passes, counts, strict=True):
        assert not oracle.given[first].any()
        if count == 2:
            torch.testing.assert_close(
                oracle.given[first + 1], torch.full((4, 1, 4, 4), 0.25), atol=2e-3, rtol=0
            )


def test_no_gradient_flows_through_the_estimate(tmp_path):
    trainer = trainer_of(
        tmp_path, Conditioned, PROCESSES["EDM"](), pictures(), self_condition="x_self_cond"
    )
    trainer.fit()
    assert not any(given.requires_grad for given in trainer.model.given)


def test_a_network_without_the_argument_is_refused(tmp_path):
    with pytest.raises(InputError, match="a UNet has no such argument: it takes x, timesteps, y"):
        trainer_of(tmp_path, unet, cosine(), pictures(), self_condition="own")


# What belongs to a run


@pytest.mark.seconds
def test_what_is_frozen_stays_so(tmp_path):
    model = made(SmallDiT)
    model.patch.requires_grad_(False)
    process, config = cosine(), TrainConfig(**{**SETTINGS, "steps": 1})
    Trainer(model, process, labelled(), config, tmp_path, device="cpu", progress=False).fit()
    resumed = Trainer.resume(
        tmp_path, labelled(), changes={"steps": 2}, device="cpu", progress=False
    )
    assert [n for n, p in resumed.model.named_parameters() if not p.requires_grad] == [
        "patch.weight",
        "patch.bias",
    ]
    resumed.fit()
    assert torch.equal(resumed.model.patch.weight, model.patch.weight)


@pytest.mark.parametrize("name", ["epsilon", "VE", "EDM"])
@pytest.mark.parametrize("network", ["DiT", "diffusers with classes", "super-resolution"])
def test_grids_of_samples(tmp_path, name, network):
    process = cosine() if name == "epsilon" else PROCESSES[name]()
    make, data, _ = NETWORKS[network]
    settings = {"steps": 1, "sample_every": 1, "sample_count": 2, "sample_steps": 3}
    trainer = trainer_of(tmp_path, make, process, data, **settings)
    trainer.fit()
    assert (tmp_path / "samples" / "step_00000001.png").exists()


def test_a_grid_that_was_due_before_the_first_batch_of_a_resumed_run(tmp_path):
    data = torch.utils.data.DataLoader(pictures(), batch_size=4, drop_last=True, shuffle=True)
    settings = {"steps": 1, "sample_every": 1, "sample_count": 2, "sample_steps": 3}
    trainer = trainer_of(tmp_path, unet, cosine(), data, **settings)
    folder = tmp_path / "samples" / "step_00000001.png"
    at_step(trainer, 1, lambda: folder.mkdir(parents=True))
    with pytest.raises(OSError, match="step 1 is saved"):
        trainer.fit()
    folder.rmdir()
    resumed = Trainer.resume(tmp_path, data, changes={"steps": 2}, device="cpu", progress=False)
    resumed.fit()
    assert folder.is_file()
    whole = trainer_of(tmp_path / "whole", unet, cosine(), data, **{**settings, "steps": 2})
    whole.fit()
    found, expected = state_of(resumed), state_of(whole)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_what_lies_beside_x_is_mirrored_with_it(tmp_path):
    trainer = trainer_of(
        tmp_path,
        partial(unet, super_res=True),
        cosine(),
        with_low_res(),
        batch_size=6,
        flip=True,
    )
    mirrored = 0
    for _ in range(4):
        x, kwargs = trainer.feed.next_batch(trainer.step)
        assert kwargs["low_res"].dtype == torch.float32
        straight, turned = x[..., ::2, ::2], x.flip(-1)[..., ::2, ::2].flip(-1)
        for sample, one, other in zip(kwargs["low_res"], straight, turned, strict=True):
            assert torch.equal(sample, one) or torch.equal(sample, other)
            mirrored += torch.equal(sample, other)
    assert 0 < mirrored < 24


@pytest.mark.parametrize(
    ("data", "given", "words"),
    [
        (floats(1, 8, 8), None, "uint8 values, not of torch.float32"),
        (list(pictures()), floats(1, 8, 8), "uint8 values, not of torch.float32"),
        (iter(pictures()), None, "needs data with len() and items: give eval_dataset"),
    ],
)
def test_bits_are_those_of_bytes(tmp_path, data, given, words):
    config = TrainConfig(**{**SETTINGS, "nll_every": 1})
    with pytest.raises(InputError, match=re.escape(words)):
        Trainer(unet(), cosine(), data, config, tmp_path, eval_dataset=given, device="cpu")


class Answering(Conditioned):
    """Its answer in a tuple, as some transformers have it."""

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor) -> Any:
        return (super().forward(x, t, x_self_cond),)


@pytest.mark.seconds
def test_all_that_a_run_shows_of_itself(tmp_path):
    """Bits/dim of other data, and a grid, of a network that is self-conditioned."""
    settings = {"self_condition": "x_self_cond", "nll_every": 2, "nll_images": 2, "steps": 2}
    config = TrainConfig(**{**SETTINGS, **settings, "sample_every": 2, "sample_count": 2})
    data, evaluated = floats(1, 8, 8), list(pictures())
    trainer = Trainer(
        Answering(),
        cosine(),
        data,
        config,
        tmp_path,
        eval_dataset=evaluated,
        device="cpu",
        progress=False,
    )
    trainer.fit()
    assert any("bits_per_dim" in line for line in read_lines(tmp_path))
    assert (tmp_path / "samples" / "step_00000002.png").is_file()
    sampled(fastdiff.load(tmp_path), pictures()[0])


def test_items_of_one_part_are_x(tmp_path):
    data = torch.utils.data.TensorDataset(pictures())
    trainer = trainer_of(tmp_path, unet, cosine(), data, batch_size=6)
    x, kwargs = trainer.feed.next_batch(trainer.step)
    assert x.shape == (6, 1, 8, 8) and kwargs == {}


def test_x_of_other_channels_than_the_networks_is_refused(tmp_path):
    with pytest.raises(InputError, match="x of the data has 2 channels, the network takes 1"):
        trainer_of(tmp_path, unet, cosine(), floats(2, 8, 8))


def test_trained_and_loaded_back_in_diffusers(tmp_path):
    from diffusers import UNet2DModel

    process = cosine()
    trainer_of(tmp_path / "run", diffusers_unet, process, pictures(), steps=2).fit()
    model = fastdiff.load(tmp_path / "run").model
    model.save_pretrained(tmp_path / "theirs")
    theirs = UNet2DModel.from_pretrained(tmp_path / "theirs").eval()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 6])
    with torch.no_grad():
        assert torch.equal(theirs(x, t).sample, model(x, t).sample)
    again = fastdiff.load(tmp_path / "theirs").model  # as fastdiff's own U-Net
    with torch.no_grad():
        torch.testing.assert_close(again(x, t), theirs(x, t).sample, atol=1e-5, rtol=1e-4)

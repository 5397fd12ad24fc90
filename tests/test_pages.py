"""The pages of docs/ are true: what they show runs, and "after" computes what "before" does.

Everything is run as printed but for sizes and the device.
"""

import re
import sys
import types

import pytest
import torch
from torch import nn

import fastdiff
from accelerate_tools import T, X, network
from ddpm_pytorch_package import package
from fastdiff.cli import main
from fastdiff.models.fused import Fused
from fastdiff.models.power_function import coefficients
from fastdiff.process.schedules import linear_betas
from improved_diffusion_tools import CODEBASES
from page_tools import ROOT, blocks, parse_commands, run, save_pipeline, smaller
from sampler_tools import closed_form

FOLDERS = "fastdiff|kernels|csrc|tests|benchmarks|examples|docs"
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))


def assert_same(actual, expected):
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape and torch.isfinite(actual).all()
    assert (actual - expected).abs().max() <= 1e-3


def test_there_is_a_page_for_every_codebase():
    names = ("any_model", "denoising_diffusion_pytorch", "diffusers", "improved_diffusion")
    names += ("k_diffusion",)
    assert {f"docs/{name}.md" for name in names} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_files_and_commands(page):
    text = (ROOT / page).read_text()
    assert parse_commands(page) == len(re.findall(r"^(?:fastdiff|torchrun) ", text, re.MULTILINE))
    for name in re.findall(rf"(?<![\w/])(?:{FOLDERS})/[\w/]+(?:\.\w+)?", text):
        assert (ROOT / name).exists(), name
    named = re.findall(r"`(?:[\w.]+ = )?(fastdiff(?:\.\w+)+)", text)
    assert named or page == "docs/benchmarks.md"
    for name in named:
        owner: object = fastdiff
        for part in name.split(".")[1:]:
            if isinstance(owner, types.ModuleType) and not hasattr(owner, part):
                __import__(f"{owner.__name__}.{part}")
            owner = getattr(owner, part)


@pytest.mark.seconds
def test_diffusers(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    save_pipeline(tmp_path / "path/to/ddpm-cifar10")
    monkeypatch.chdir(tmp_path)
    before, after, exchanged, fused, loaded = (
        example.replace('"cuda"', '"cpu"') for example in blocks("docs/diffusers.md", "python")
    )

    def generator():
        return torch.Generator().manual_seed(5)

    stock, ours = (
        run(
            "docs/diffusers.md",
            smaller(example, batch_size="2, output_type='np'"),
            generator=generator(),
        )
        for example in (before, after)
    )
    assert_same(ours["images"], stock["images"])

    pipe = run("docs/diffusers.md", exchanged, pipe=stock["pipe"])["pipe"]
    assert type(pipe.scheduler).__module__.startswith("fastdiff.")
    calls = {"batch_size": 2, "num_inference_steps": 50, "output_type": "np"}
    assert_same(pipe(generator=generator(), **calls).images, stock["images"])
    run("docs/diffusers.md", fused, pipe=pipe)
    assert_same(pipe(generator=generator(), **calls).images, stock["images"])

    names = run("docs/diffusers.md", loaded.replace("(16, 3", "(2, 3"))
    assert names["images"].shape == (2, 3, 32, 32)
    assert names["checkpoint"].diffusion.betas[-1] == pytest.approx(0.004)
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "path/to/unet")
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "path/to/ddpm-cifar10/unet")
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([3, 700])
    with torch.no_grad():
        torch.testing.assert_close(again(x, t).sample, unet(x, t).sample)


@pytest.mark.seconds
def test_denoising_diffusion_pytorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", package())
    images, kinds = [], []
    for example in blocks("docs/denoising_diffusion_pytorch.md", "python"):
        example = smaller(example, dim=8, image_size=16, sampling_timesteps=20, batch_size=2)
        torch.manual_seed(0)
        done = run("docs/denoising_diffusion_pytorch.md", example)
        images.append(done["images"])
        kinds.append(done["diffusion"])
    assert [isinstance(kind, Fused) for kind in kinds] == [False, True]
    before, after = images
    assert_same(after, before)


class Conditional(nn.Module):
    """Smooth, so that it does not amplify rounding."""

    def __init__(self):
        super().__init__()
        self.labels = nn.Embedding(10, 3)

    def forward(self, x, timesteps, y=None):
        shift = 0.1 * self.labels(y)[..., None, None]
        return torch.tanh(x) * (0.6 + 0.4 * torch.cos(timesteps / 7).view(-1, 1, 1, 1)) + shift


@pytest.mark.parametrize("codebase", CODEBASES)
def test_improved_diffusion(codebase):
    def create_model_and_diffusion():
        torch.manual_seed(0)
        return Conditional().eval(), CODEBASES[codebase].diffusion()

    names = {"create_model_and_diffusion": create_model_and_diffusion, "options": {}}
    samples = []
    for example in blocks("docs/improved_diffusion.md", "python"):
        example = example.replace("(16, 3, 64, 64)", "(2, 3, 8, 8)")
        done = run("docs/improved_diffusion.md", example, **names, y=torch.tensor([3, 7]))
        samples.append(done["sample"])
    before, after = samples
    assert_same(after, before)


def test_codec():
    (example,) = blocks("docs/codec.md", "python")
    names = {"model": closed_form(), "diffusion": fastdiff.create_diffusion(steps=1000)}
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    done = run("docs/codec.md", smaller(example, steps=10), **names, images=images)
    assert done["between"].shape == (9, 3, 8, 8) and torch.isfinite(done["between"]).all()


def test_any_model(capsys):
    accelerating, sampling = blocks("docs/any_model.md", "python")
    model = network()
    run("docs/any_model.md", accelerating, model=model, x=X, t=T)
    assert str(fastdiff.report(model)) in capsys.readouterr().out
    fastdiff.restore(model)
    done = run("docs/any_model.md", sampling, model=closed_form(), betas=linear_betas(1000))
    assert done["images"].shape == (16, 3, 32, 32) and torch.isfinite(done["images"]).all()


@pytest.mark.seconds
def test_sampling():
    sampler, function, reused = (
        run("docs/sampling.md", example) for example in blocks("docs/sampling.md", "python")
    )
    filled, known = sampler["filled"], sampler["photo"][..., :4]
    assert torch.equal(filled[..., :4], known) and sampler["step"]["step"] == 7
    assert function["images"].shape == (4, 3, 32, 32)
    assert len(reused["dense"]) == len(reused["best"]) == 6 and reused["images"].isfinite().all()


@pytest.mark.seconds
def test_guidance():
    (example,) = blocks("docs/guidance.md", "python")
    images = run("docs/guidance.md", example)["images"]
    assert images.shape == (4, 1, 8, 8) and images.isfinite().all()


def test_operations():
    fused, steps = (
        run("docs/operations.md", example) for example in blocks("docs/operations.md", "python")
    )
    torch.testing.assert_close(fused["y"], fused["plain"])
    assert steps["x"].isfinite().all() and torch.equal(steps["memory"][0], steps["x_0"])


@pytest.mark.seconds
def test_training(tmp_path, monkeypatch):
    pytest.importorskip("tqdm")  # the bar of a run
    monkeypatch.chdir(tmp_path)
    example, own = blocks("docs/training.md", "python")
    done = run("docs/training.md", smaller(example, steps=4))
    assert (done["checkpoint"].step, done["checkpoint"].weights) == (4, "0.999")
    own = run("docs/training.md", own, **{k: v for k, v in done.items() if k != "__builtins__"})
    assert own["trainer"].fit() == 4
    text = (ROOT / "docs" / "training.md").read_text()
    (edm,) = re.findall("^fastdiff (train --process edm .+)$", text, re.MULTILINE)
    assert main([*edm.split(), "--steps", "2", "--quiet"]) == 0
    assert isinstance(fastdiff.load("runs/edm").diffusion, fastdiff.EDM)


def test_the_table_of_averages_made_of_snapshots():
    text = (ROOT / "docs" / "training.md").read_text()
    rows = re.findall(r"^\| (?:`--sigma-rel`|off, of (\d+).*?) \| (.+) \|$", text, re.MULTILINE)
    (_, widths), *errors = rows
    assert [count for count, _ in errors] == ["20", "100"]
    for count, row in errors:
        snapshots = [(i, s) for i in range(1, int(count) + 1) for s in (0.05, 0.1)]
        for width, said in zip(widths.split(" | "), row.split(" | "), strict=True):
            _, off = coefficients(snapshots, int(count), float(width))
            assert float(said.removesuffix(" %")) == pytest.approx(100 * off, rel=0.1), width


def test_cascade():
    (example,) = blocks("docs/cascade.md", "python")
    found = run("docs/cascade.md", smaller(example, steps="2"))
    assert found["images"].shape == found["larger"].shape == (2, 3, 64, 64)

"""A program inside a captured sampling step: one graph, live weights, few kernels."""

import pytest
import torch
from diffusers import UNet2DModel

from capture_tools import taped
from diffusers_format_tools import TINY, theirs
from executor_cases import changes
from fastdiff import UNet
from fastdiff.models.execution import executor as executor_module
from fastdiff.models.execution.explanation import kernels
from fastdiff.models.execution.lowering_cuda import CudaLowering
from fastdiff.sampling.capture import CapturedStep
from fastdiff.sampling.sampler import Sampler
from published_unet import Guided, Improved, small
from sampler_tools import diffusion
from unet_tools import small_unet

PROCESS = diffusion(20)
SHAPE = (2, 3, 8, 8)


@pytest.fixture(autouse=True)
def graphs():
    """How many graphs were captured; programs are lowered for GPUs."""
    with taped() as made, pytest.MonkeyPatch.context() as patch:
        patch.setitem(executor_module.LOWERINGS, "cpu", CudaLowering)
        yield made


def calm_unet():
    """A network with answers so small that its rounding is not amplified from step to step."""
    model = small_unet()
    with torch.no_grad():
        for parameter in model.out[2].parameters():
            parameter.mul_(0.1)
    return model


def samplers(model, **options):
    options = {"steps": 3, "method": "ddim", **options}
    return (
        Sampler(model, PROCESS, executor=True, capture=True, **options),
        Sampler(model, PROCESS, executor=False, capture=False, **options),
    )


@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-4), (torch.bfloat16, 0.1)])
def test_a_graph_of_a_program_serves_every_row(graphs, dtype, tolerance):
    ours, theirs = samplers(calm_unet(), dtype=dtype)
    for seed in (1, 2):
        found, expected = (s.sample(SHAPE, seed=seed) for s in (ours, theirs))
        assert (found - expected).abs().max() < tolerance
    assert graphs() == 1
    assert ours.explain().startswith("a captured CUDA graph")
    assert "; the network as a program of" in ours.explain()


@pytest.mark.parametrize("kind", [Improved, Guided, UNet2DModel])
def test_a_graph_of_another_codebases_network(graphs, kind):
    model = theirs(TINY) if kind is UNet2DModel else small(kind)
    ours, plain = samplers(model)
    found, expected = (s.sample(SHAPE, seed=1) for s in (ours, plain))
    assert (found - expected).abs().max() < 1e-3
    assert graphs() == 1
    assert "; the network as a program of" in ours.explain()


@pytest.mark.parametrize("kind", ["in place", "unseen", "exchange", "module"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@torch.no_grad()
def test_weights_are_live_between_calls(graphs, kind, dtype):
    model = calm_unet()
    ours, _ = samplers(model, dtype=dtype)
    before = ours.sample(SHAPE)
    changes(model)[kind]()
    found = ours.sample(SHAPE)
    again, _ = samplers(model, dtype=dtype)
    assert torch.equal(found, again.sample(SHAPE))
    assert (found - before).abs().max() > 1e-3
    # What is new in a parameter the graph's copies take where they are.
    assert graphs() == 2 + (kind in ("exchange", "module"))


def test_two_sizes_share_the_weights(graphs):
    ours, theirs = samplers(calm_unet())
    for shape in (SHAPE, (1, 3, 6, 10), SHAPE):
        assert (ours.sample(shape) - theirs.sample(shape)).abs().max() < 1e-4
    assert graphs() == 2


@pytest.mark.seconds
@torch.no_grad()
def test_a_captured_step_of_ddpm_cifar10_is_at_most_200_kernels(monkeypatch):
    """As PyTorch's dispatcher and Triton's launcher see them, with the update, the row's number and
    what else a replay does; cuDNN's and cuBLAS's own are one for each call."""
    pytest.importorskip("triton")
    from kernel_counting import counting_kernels

    unet = UNet.from_preset("ddpm-cifar10").eval()
    sampler, _ = samplers(unet, dtype=torch.bfloat16)
    steps = []

    def noted(step, *extent):
        steps.append(step)
        original(step, *extent)

    original = CapturedStep._step
    monkeypatch.setattr(CapturedStep, "_step", noted)
    sampler.sample((1, 3, 32, 32))
    (program,) = sampler.network.programs.forwards.values()
    program.executor.begin()
    with counting_kernels() as found:
        original(steps[-1])
    program.executor.end()
    assert found["forward_once_kernel"] == 51 and found["forward_kernel"] == 6
    of_the_program = kernels(program.executor._last)
    assert of_the_program == 176
    assert of_the_program < found.total() <= 200, found


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-2), (torch.bfloat16, 0.2)])
def test_on_a_gpu(dtype, tolerance):
    unet = calm_unet().cuda()
    process = PROCESS
    found, expected = (
        Sampler(unet, process, steps=5, method="ddim", dtype=dtype, executor=executor)
        for executor in (True, False)
    )
    images = [s.sample((2, 3, 16, 16), seed=1) for s in (found, expected)]
    assert found.explain().startswith("a captured CUDA graph")
    assert (images[0] - images[1]).abs().max() < tolerance

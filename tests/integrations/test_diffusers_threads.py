"""Pipelines that share a U-Net, in several threads."""

import diffusers
import pytest
import torch

from fastdiff.acceleration import is_accelerated
from fastdiff.integrations.diffusers import DDIMScheduler, accelerate_pipeline, restore_pipeline
from thread_tools import at_once


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


def pipeline(unet, scheduler=None, **options):
    pipe = diffusers.DDIMPipeline(unet, scheduler or diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return accelerate_pipeline(pipe, **options)


def drawn(pipe, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    return pipe(num_inference_steps=steps, generator=generator, output_type="pt").images


@pytest.mark.seconds
def test_pipelines_of_one_unet_in_threads_of_their_own(unet):
    parameters = list(unet.parameters())
    dtypes = (torch.bfloat16, torch.bfloat16, None)
    pipes = [pipeline(unet, dtype=dtype) for dtype in dtypes]
    expected = [drawn(pipe, 2, seed) for seed, pipe in enumerate(pipes)]

    def again(seed):
        return lambda: all(
            torch.equal(drawn(pipes[seed], 2, seed), expected[seed]) for _ in range(20)
        )

    assert all(at_once(*map(again, range(3))))
    assert all(a is b for a, b in zip(parameters, unet.parameters(), strict=True))
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    assert not any("forward" in vars(part) for part in unet.modules())
    assert not any(part.training for part in unet.modules())


@pytest.mark.seconds
@pytest.mark.parametrize("shares", ["pipeline", "scheduler"])
def test_a_pipeline_or_a_scheduler_in_several_threads(unet, shares):
    scheduler = DDIMScheduler()
    pipes = [pipeline(unet, scheduler) for _ in range(3)]
    if shares == "pipeline":
        pipes = pipes[:1] * 3
    expected = [drawn(pipe, steps, 0) for pipe, steps in zip(pipes, (1, 2, 3), strict=True)]

    def again(i):
        return lambda: all(torch.equal(drawn(pipes[i], i + 1, 0), expected[i]) for _ in range(15))

    assert all(at_once(*map(again, range(3))))


@pytest.mark.seconds
def test_pipelines_made_and_restored_at_once(unet):
    before = {name: p.stride() for name, p in unet.named_parameters()}
    kept = pipeline(unet)
    expected = drawn(kept, 2, 0)

    def come_and_go():
        same = []
        for _ in range(3):
            pipe = pipeline(unet)
            same.append(torch.equal(drawn(pipe, 2, 0), expected))
            restore_pipeline(pipe)
        return all(same)

    def stay():
        return all(torch.equal(drawn(kept, 2, 0), expected) for _ in range(10))

    assert all(at_once(come_and_go, come_and_go, stay))
    assert is_accelerated(unet)
    restore_pipeline(kept)
    assert not is_accelerated(unet)
    assert {name: p.stride() for name, p in unet.named_parameters()} == before


def test_the_last_pipeline_puts_the_unet_back_whoever_came_first(unet):
    first, second = pipeline(unet), pipeline(unet)
    restore_pipeline(first)
    assert is_accelerated(unet)
    images = drawn(second, 2, 0)
    restore_pipeline(second)
    assert not is_accelerated(unet)
    torch.testing.assert_close(drawn(second, 2, 0), images, rtol=1e-4, atol=1e-4)

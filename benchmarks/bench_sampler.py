"""One sampling step (network, DDPM update) against diffusers' UNet2DModel + DDPMScheduler."""

import pytest
import torch

peers = pytest.importorskip("peers", reason="diffusers is not installed here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", peers.NETWORKS)
def test_sampling_step(race, name, batch, dtype):
    ratios = race(
        peers.fastdiff_sampling_step(name, batch, dtype),
        {"diffusers": peers.diffusers_sampling_step(name, batch, dtype)},
        rounds=9 if batch > 1 else 21,
    )
    assert ratios["diffusers"] >= 1.0

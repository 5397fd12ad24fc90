"""One training step (forward, backward, AdamW) against diffusers' UNet2DModel + DDPMScheduler."""

import pytest
import torch

peers = pytest.importorskip("peers", reason="diffusers is not installed here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [4, 8])
@pytest.mark.parametrize("name", peers.NETWORKS)
def test_training_step(race, name, batch, dtype):
    ratios = race(
        peers.fastdiff_training_step(name, batch, dtype),
        {"diffusers": peers.diffusers_training_step(name, batch, dtype)},
        rounds=7 if batch > 1 else 11,
    )
    assert ratios["diffusers"] >= 1.0

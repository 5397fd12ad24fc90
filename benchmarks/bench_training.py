"""One training step (forward, backward, AdamW) against diffusers' UNet2DModel + DDPMScheduler."""

import pytest

from conftest import Case
from harness import peers
from harness.timing import Contender

pytest.importorskip("diffusers", reason="diffusers is not installed here")


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("batch", [4, 8])
@pytest.mark.parametrize("name", ["ddpm-cifar10", "small"])
def test_training_step(race, name, batch, dtype):
    race(
        Case("training_step", name, dtype, batch, targets={"diffusers": 1.0}),
        Contender("fastdiff", peers.fastdiff_training_step(name, batch, dtype)),
        [Contender("diffusers", peers.diffusers_training_step(name, batch, dtype))],
        rounds=7 if batch > 1 else 11,
    )

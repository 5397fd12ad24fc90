"""One sampling step (network, DDPM update) against diffusers' UNet2DModel + DDPMScheduler."""

import pytest

from conftest import Case
from timing import Contender

peers = pytest.importorskip("peers", reason="diffusers is not installed here")


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", peers.NETWORKS)
def test_sampling_step(race, name, batch, dtype):
    race(
        Case("sampling_step", name, dtype, batch, targets={"diffusers": 1.0}),
        Contender("fastdiff", peers.fastdiff_sampling_step(name, batch, dtype)),
        [Contender("diffusers", peers.diffusers_sampling_step(name, batch, dtype))],
        rounds=9 if batch > 1 else 21,
    )

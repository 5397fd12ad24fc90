"""The U-Net's forward (ddpm-cifar10): against the same network on plain PyTorch operations, and
against diffusers' UNet2DModel of the same size.

On a GPU all are launched from Python, without a graph.
"""

from collections.abc import Callable

import pytest
import torch

from conftest import Case
from harness import contenders, peers
from harness.timing import Contender

NAME, SIZE = "ddpm-cifar10", 32
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("batch", [1, 8])
def test_unet_float32(race, device, batch):
    """The fused operations in channels_last, the default, against plain ones in NCHW."""
    case = Case(
        "unet_forward",
        NAME,
        torch.float32,
        batch,
        layout="channels_last",
        targets={"reference NCHW": 1.10} if batch == 8 else {},
    )
    ours = contenders.kernels(device)
    race(
        case,
        Contender(ours, fastdiff_forward(batch, device), ours, capturable=False),
        [
            Contender(f"reference {layout}", forward, "reference", capturable=False)
            for layout in LAYOUTS
            for forward in [fastdiff_forward(batch, device, layout)]
        ],
        rounds=9 if batch > 1 else 21,
    )


@pytest.mark.parametrize("batch", [1, 8])
def test_unet_bfloat16(race, device, batch):
    """bfloat16 by autocast in channels_last, against float32 networks, eager and in NCHW.

    One autocast is held open over the rounds, so that the weights are cast once, as in a Sampler's
    loop.
    """
    pytest.importorskip("diffusers", reason="diffusers is not installed here")
    model = peers.diffusers_network(NAME).eval().to(device)
    x, t = arguments(batch, device)
    case = Case(
        "unet_forward",
        NAME,
        torch.bfloat16,
        batch,
        layout="channels_last",
        targets={"diffusers float32": 2.2} if batch == 8 else {},
    )
    ours = contenders.kernels(device)
    plain = fastdiff_forward(batch, device, "NCHW")
    with torch.autocast(device.type, torch.bfloat16):
        race(
            case,
            Contender(ours, fastdiff_forward(batch, device), ours, capturable=False),
            [
                Contender(name, without_autocast(call, device), backend, capturable=False)
                for name, call, backend in (
                    ("diffusers float32", without_gradients(lambda: model(x, t).sample), None),
                    ("reference NCHW float32", plain, "reference"),
                )
            ],
            rounds=9 if batch > 1 else 21,
        )


def fastdiff_forward(
    batch: int, device: torch.device, layout: str = "channels_last"
) -> Callable[[], object]:
    model = peers.fastdiff_network(NAME).eval()
    model = model.to(device, memory_format=LAYOUTS[layout])
    x, t = arguments(batch, device)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    return without_gradients(lambda: model(x, t))


def arguments(batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return x.to(device), torch.full((batch,), 500, device=device)


def without_gradients(call: Callable[[], object]) -> Callable[[], object]:
    return torch.no_grad()(call)


def without_autocast(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    def step() -> object:
        with torch.autocast(device.type, enabled=False):
            return call()

    return step

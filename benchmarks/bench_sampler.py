"""DDIM sampling: the Sampler against diffusers' UNet2DModel + DDIMScheduler of the same size.

Diffusers runs in its default setting and in its best ones, with the same weights, and on CPUs its
network in other runtimes too, where they are installed. 50 steps where they take seconds; elsewhere
ten, which cost what the others do.
"""

import pytest
import torch

from conftest import Case
from harness import peers_graphs
from harness import peers_sampling as sampling
from harness.timing import Contender

pytest.importorskip("diffusers", reason="diffusers is not installed here")

TARGETS = {  # times faster than (eager float32, the best setting) by dtype and batch
    ("float32", 1): (1.35, 1.0),
    ("float32", 8): (1.15, 1.0),
    ("bfloat16", 1): (2.5, 1.25),
    ("bfloat16", 8): (2.3, 1.25),
}


def is_optional(peer: str) -> bool:
    return "compiled" in peer or peer.split()[0] in peers_graphs.RUNTIMES


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("batch, steps", [(1, 50), (8, 10)])
def test_ddim_on_a_cpu(race, dtype, batch, steps):
    name, dtype_name = "ddpm-cifar10", str(dtype).removeprefix("torch.")
    made = sampling.contenders(name, batch, torch.device("cpu"), steps)
    theirs = [f"{who} {dtype_name}" for who in ("diffusers", *peers_graphs.RUNTIMES)]
    rivals = (peer for peer in made if peer.startswith(tuple(theirs)))
    wanted = list(dict.fromkeys((sampling.EAGER, *rivals)))
    eager, best = TARGETS[dtype_name, batch]
    ours = made[f"fastdiff {dtype_name}"]()
    race(
        Case(
            f"ddim_{steps}_steps",
            name,
            dtype,
            batch,
            flops=steps * sampling.network_flops(name, batch),
            targets={peer: eager if peer == sampling.EAGER else best for peer in wanted},
        ),
        Contender("fastdiff", ours),
        [
            Contender(peer, sampling.on_first_call(made[peer]), optional=is_optional(peer))
            for peer in (*wanted, f"fastdiff {dtype_name} compiled")
        ],
        rounds=3,
        extra={
            "steps": steps,
            "matrix_product_share": sampling.matrix_product_share(ours),
            "peak_mb": {
                peer: sampling.peak_memory_mb(name, batch, peer)
                for peer in (f"fastdiff {dtype_name}", *wanted)
                if not is_optional(peer)
            },
        },
    )


@pytest.mark.parametrize("batch", [1, 16, 64, 256])
@pytest.mark.parametrize("name", ["ddpm-cifar10", "iddpm-imagenet64"])
def test_ddim_on_a_gpu(race, device, compiles, name, batch):
    if device.type != "cuda":
        pytest.skip("needs an NVIDIA GPU")
    steps = 50 if batch <= 16 else 10
    modes = sampling.MODES["cuda"] if compiles(None, batch) else {}
    made = sampling.contenders(name, batch, device, steps, modes)
    peers = {peer: make for peer, make in made.items() if not peer.startswith("fastdiff")}
    targets = {sampling.EAGER: 5.0} if batch == 1 else {}
    if batch == 64:
        targets |= {f"{who} bfloat16 {how}": 1.3 for who in ("diffusers", "plain") for how in modes}
    race(
        Case(
            f"ddim_{steps}_steps",
            name,
            torch.bfloat16,
            batch,
            flops=steps * sampling.network_flops(name, batch),
            targets=targets,
        ),
        Contender("fastdiff", made["fastdiff bfloat16"](), capturable=False),
        [
            Contender("fastdiff float32", made["fastdiff float32"](), capturable=False),
            *(
                Contender(peer, make(), capturable=False, optional=True)
                for peer, make in peers.items()
            ),
        ],
        rounds=3,
        extra={"steps": steps},
    )

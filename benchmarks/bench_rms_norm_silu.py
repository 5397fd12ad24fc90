"""RMS norm over the channels, FiLM and SiLU, against denoising-diffusion-pytorch's blocks.

Floor: reads x and writes y, 2N.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

import fastdiff
from conftest import Case
from fastdiff.ops.explain import CHOOSERS
from harness import contenders, peers_eager
from harness.timing import Contender, Inputs, normal

CHOOSE = CHOOSERS["rms_norm_silu"]
EAGER: dict[str, Callable[..., Tensor]] = {
    "silu": peers_eager.rms_norm_silu,
    "film": peers_eager.rms_norm_film_silu,
    "norm": peers_eager.rms_norm,
}
# Nominal operations per element: norm 4, FiLM 2, SiLU 5.
FLOPS = {"norm": 4, "silu": 9, "film": 11}


def fused(
    activation: str | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    call: Callable[..., Any] = fastdiff.ops.rms_norm_silu,
) -> Any:
    return call(x, weight, scale=scale, shift=shift, activation=activation)


def test_rms_norm_silu(race, device, compiles, rms_norm, batch_of_device, dtype, layout):
    batch, channels, size, form = batch_of_device, rms_norm.channels, rms_norm.size, rms_norm.form
    ours, eager = partial(fused, None if form == "norm" else "silu"), EAGER[form]

    def inputs() -> Inputs:
        x = normal(batch, channels, size, size, dtype=dtype, device=device, layout=layout)
        weight = normal(1, channels, 1, 1, dtype=dtype, device=device, offset=1)
        film = normal(batch, 2 * channels, 1, 1, dtype=dtype, device=device, offset=2)
        return (x, weight, *(film.chunk(2, dim=1) if form == "film" else ()))

    first = inputs()
    case = Case(
        "rms_norm_silu",
        str(rms_norm),
        dtype,
        batch,
        variant=form,
        layout=layout,
        size_bytes=2 * first[0].nbytes,
        flops=first[0].numel() * FLOPS[form],
    )
    choose = partial(ours, *first, call=CHOOSE)
    plan, others, reason = contenders.of_operation(ours, choose, first[0])
    peers = [*others, Contender("eager", eager), contenders.copy()]
    if compiles(rms_norm, batch):
        peers.append(contenders.compiled(eager))
    race(case, plan, peers, first, inputs, reason=reason)

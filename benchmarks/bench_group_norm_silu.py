"""GroupNorm, FiLM and SiLU: every norm of the published U-Nets, against F.silu(F.group_norm(x)).

Floor: forward reads x and writes y, 2N; backward reads x and dy and writes dx, 3N.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import Tensor

import fastdiff
from conftest import Case
from fastdiff.ops.explain import CHOOSERS
from harness import contenders, peers_eager, shapes
from harness.timing import Contender, Inputs, normal, with_backward

CHOOSE = CHOOSERS["group_norm_silu"]
EAGER = {
    "silu": peers_eager.group_norm_silu,
    "film": peers_eager.group_norm_film_silu,
    "norm": peers_eager.group_norm,
}
# Nominal operations per element: norm 7, FiLM 2, SiLU 5; their backward about twice that.
FLOPS = {"norm": 7, "silu": 12, "film": 14}


def fused(
    activation: str | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    call: Callable[..., Any] = fastdiff.ops.group_norm_silu,
) -> Any:
    return call(x, shapes.GROUPS, weight, bias, scale=scale, shift=shift, activation=activation)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_group_norm_silu(race, device, compiles, norm, batch_of_device, dtype, layout, direction):
    batch, backward = batch_of_device, direction != "forward"
    activation = None if norm.form == "norm" else "silu"
    ours, eager = partial(fused, activation), EAGER[norm.form]

    def inputs() -> Inputs:
        image = partial(normal, batch, norm.channels, norm.size, norm.size, layout=layout)
        x = image(dtype=dtype, device=device)
        rows = {"weight": (norm.channels,), "bias": (norm.channels,)}
        if norm.form == "film":
            rows |= {"scale": (batch, norm.channels), "shift": (batch, norm.channels)}
        rest = [
            normal(*shape, dtype=dtype, device=device, offset=1 + i)
            for i, shape in enumerate(rows.values())
        ]
        if not backward:
            return (x, *rest)
        upstream = image(dtype=dtype, device=device, offset=9)
        return (*(tensor.requires_grad_() for tensor in (x, *rest)), upstream)

    elements = batch * norm.channels * norm.size**2
    case = Case(
        "group_norm_silu",
        str(norm),
        dtype,
        batch,
        variant=norm.form,
        layout=layout,
        direction=direction,
        size_bytes=elements * dtype.itemsize * (5 if backward else 2),
        flops=elements * FLOPS[norm.form] * (3 if backward else 1),
        models=norm.count,
    )
    step = with_backward if backward else lambda call: call
    first = inputs()
    choose = partial(fused, activation, *first[: 5 if norm.form == "film" else 3], call=CHOOSE)
    plan, others, reason = contenders.of_operation(step(ours), choose, first[0])
    peers = [*others, Contender("eager", step(eager)), contenders.copy()]
    if compiles(norm, batch):
        peers.append(contenders.compiled(eager, backward=backward))
    race(case, plan, peers, first, inputs, reason=reason)

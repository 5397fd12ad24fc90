"""Attention on the packed qkv projection, against F.scaled_dot_product_attention on views of it.

Floor: forward reads qkv and writes the result, 4 passes of N·C·T; backward reads qkv, the result
and its gradient and writes the gradient of qkv, 8; or the products at the matrix product's rate.
"""

from functools import partial

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastdiff
from conftest import Case
from fastdiff.ops.dispatch import OPERATIONS
from harness import contenders, peers_eager, summary
from harness.timing import Contender, Inputs, normal, with_backward

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_attention(race, device, compiles, heads, batch_of_device, dtype, layout, direction):
    """layout: "channels_last" is the token-major projection that the U-Net makes."""
    batch, backward, on_gpu = batch_of_device, direction != "forward", device.type == "cuda"
    channels = heads.heads * heads.head_dim

    def ours(qkv, call=fastdiff.ops.attention):
        return call(qkv, heads.heads, order=heads.order)

    def eager(qkv):
        return peers_eager.attention(qkv, heads.heads, heads.order)

    def inputs() -> Inputs:
        make = partial(normal, dtype=dtype, device=device, layout=layout)
        qkv = make(batch, 3 * channels, heads.tokens)
        if not backward:
            return (qkv,)
        # What a network's next layer sends back: token-major, as the result is.
        upstream = normal(
            *(batch, channels, heads.tokens),
            dtype=dtype,
            device=device,
            layout="channels_last",
            offset=9,
        )
        return qkv.requires_grad_(), upstream

    first = inputs()
    # Two products forward and four backward, if the backward computes none of them again.
    passes, products = (12, 12) if backward else (4, 4)
    elements = batch * channels * heads.tokens
    case = Case(
        "attention",
        str(heads),
        dtype,
        batch,
        layout=layout,
        direction=direction,
        size_bytes=elements * dtype.itemsize * passes,
        flops=products * elements * heads.tokens,
        models=heads.count,
        targets={summary.BEST_SDPA: summary.sdpa_target(heads.head_dim)} if on_gpu else {},
    )
    step = with_backward if backward else lambda call: call
    choose = partial(ours, first[0], OPERATIONS["attention"].choose)
    plan, others, reason = contenders.of_operation(step(ours), choose, first[0])
    peers = [*others, Contender("eager", step(eager)), contenders.copy()]
    if on_gpu:
        for name, backend in SDPA.items():
            peers.append(Contender(name, with_sdpa(step(eager), backend), optional=True))
    if compiles(heads, batch):
        peers.append(contenders.compiled(eager, backward=backward))
    race(case, plan, peers, first, inputs, reason=reason)


def with_sdpa(call, backend: SDPBackend):
    """``call`` with one of PyTorch's kernels; it raises where that one cannot serve."""

    def run(*inputs):
        with sdpa_kernel(backend):
            return call(*inputs)

    return run

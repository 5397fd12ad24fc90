"""Measures what the convolutions' plan rests on: python benchmarks/measure_convolution_plan.py

Every kind of products (fastdiff/ops/convolution/packed.py) and PyTorch's own, with its weight
packed, turn by turn in one process, over the shapes of the published U-Nets at batch 1 and 8.
OMP_NUM_THREADS says on how many threads; a second run betters the rows of the first. Writes
benchmarks/results/convolution_plan/<device>-<n>-threads.json; tests/ops/test_convolution_plan.py
checks that the rule in fastdiff/ops/convolution/fastest.py picks (nearly) the fastest in every row
of every table.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastdiff.ops.backends import short
from fastdiff.ops.convolution.fastest import possible
from fastdiff.ops.convolution.op import convolution
from fastdiff.ops.convolution.packed import pack
from fastdiff.sampling.network import packing
from harness.plan_tables import measure_table

THREE = [  # channels, out_channels, side of a 3×3 convolution
    *[(128, 128, 32), (256, 128, 32), (384, 128, 32), (256, 256, 32)],
    *[(128, 256, 16), (256, 256, 16), (384, 256, 16), (512, 256, 16)],
    *[(256, 256, 8), (512, 256, 8), (256, 256, 4), (512, 256, 4)],
    *[(128, 128, 64), (192, 192, 64), (256, 384, 16), (384, 384, 16), (768, 384, 16)],
    *[(512, 512, 8), (1024, 512, 8), (32, 32, 8), (64, 64, 8)],
]
ONE = [(256, 768, 16), (256, 256, 16), (256, 128, 32), (512, 256, 8), (256, 768, 8)]


def cases() -> Iterator[dict]:
    for dtype in (torch.float32, torch.bfloat16):
        for kernel, shapes in ((3, THREE), (1, ONE)):
            for channels, out_channels, side in shapes:
                for samples in (1, 8):
                    yield {
                        "dtype": short(dtype),
                        "samples": samples,
                        "channels": channels,
                        "out_channels": out_channels,
                        "side": side,
                        "kernel": kernel,
                    }


@torch.no_grad()
def steps(case: dict) -> dict[str, Callable[[], Any]]:
    """Every kind of products, and PyTorch's."""
    dtype, kernel, side = getattr(torch, case["dtype"]), case["kernel"], case["side"]
    channels, out_channels = case["channels"], case["out_channels"]
    x = torch.randn(case["samples"], channels, side, side).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
    bias, before = torch.randn(out_channels), kernel // 2
    layer = torch.nn.Conv2d(channels, out_channels, kernel, padding=before, dtype=dtype)
    theirs = packing.PackedConvolution(layer, dtype)

    def own(packed: Any) -> Callable[[], Any]:
        return lambda: convolution(x, packed, bias, padding=(before, before))

    made = {
        products.name.lower(): own(pack(weight, dtype, products=products))
        for products in possible(dtype, (kernel, kernel), 1)
    }
    return {"pytorch": torch.no_grad()(lambda: theirs(x)), **made}


if __name__ == "__main__":
    with torch.no_grad():
        measure_table("convolution_plan", cases(), steps, __doc__)

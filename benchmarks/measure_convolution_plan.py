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
import torch.nn.functional as F

from fastdiff.ops.backends import short
from fastdiff.ops.convolution.fastest import Workload, folded_is_faster, possible
from fastdiff.ops.convolution.op import convolution
from fastdiff.ops.convolution.packed import pack
from fastdiff.sampling.network import packing
from harness.plan_tables import measure_table

THREE = [  # channels, out_channels, side of a 3×3 convolution's result
    *[(128, 128, 32), (256, 128, 32), (384, 128, 32), (256, 256, 32)],
    *[(128, 256, 16), (256, 256, 16), (384, 256, 16), (512, 256, 16)],
    *[(256, 256, 8), (512, 256, 8), (256, 256, 4), (512, 256, 4)],
    *[(128, 128, 64), (192, 192, 64), (256, 384, 16), (384, 384, 16), (768, 384, 16)],
    *[(512, 512, 8), (1024, 512, 8), (32, 32, 8), (64, 64, 8)],
]
DOUBLED = [(256, 256, 8), (256, 256, 16), (256, 256, 32), (192, 192, 64), (384, 384, 32)]
ONE = [(256, 768, 16), (256, 256, 16), (256, 128, 32), (512, 256, 8), (256, 768, 8)]

DOUBLING = {"upsample": True}  # before the convolution


def cases() -> Iterator[dict]:
    for dtype in (torch.float32, torch.bfloat16):
        for kernel, shapes, doubled in ((3, THREE, {}), (1, ONE, {}), (3, DOUBLED, DOUBLING)):
            for channels, out_channels, side in shapes:
                for samples in (1, 8):
                    yield {
                        "dtype": short(dtype),
                        "samples": samples,
                        "channels": channels,
                        "out_channels": out_channels,
                        "side": side,
                        "kernel": kernel,
                        **doubled,
                    }


@torch.no_grad()
def steps(case: dict) -> dict[str, Callable[[], Any]]:
    """Every kind of products, and PyTorch's."""
    dtype, kernel, side = getattr(torch, case["dtype"]), case["kernel"], case["side"]
    samples, channels, out_channels = case["samples"], case["channels"], case["out_channels"]
    upsample = case.get("upsample", False)
    sides = (kernel, kernel)
    work = Workload(dtype, samples, channels, out_channels, side, side, sides, 1, True, upsample)
    x = torch.randn(samples, channels, *(side >> upsample,) * 2).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
    bias, before = torch.randn(out_channels), kernel // 2
    layer = torch.nn.Conv2d(channels, out_channels, kernel, padding=before, dtype=dtype)
    theirs = packing.PackedConvolution(layer, dtype)

    def own(packed: Any) -> Callable[[], Any]:
        return lambda: convolution(x, packed, bias, padding=(before, before), upsample=upsample)

    doubled = before if folded_is_faster(work) else None
    made = {
        products.name.lower(): own(pack(weight, dtype, products=products, doubled=doubled))
        for products in possible(dtype, sides, 1)
    }

    def pytorchs() -> Any:
        with torch.no_grad():
            return theirs(F.interpolate(x, scale_factor=2.0) if upsample else x)

    return {"pytorch": pytorchs, **made}


if __name__ == "__main__":
    with torch.no_grad():
        measure_table("convolution_plan", cases(), steps, __doc__)

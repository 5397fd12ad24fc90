"""The launcher of rms_norm_silu against float64, on any device.

As a script, which test_triton_rms_norm_silu.py runs in a process of its own: in Triton's
interpreter, which is chosen at import, with tiles made small so that small shapes take every path.
"""

import os
import sys

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch

import fastdiff
from fastdiff.kernels import rms_norm_silu as kernels
from fastdiff.ops import rms_norm_silu
from norm_cases import error, ulps
from rms_norm_cases import case, eager, equations

SHORT = __name__ == "__main__" and sys.argv[1:] == ["short"]
# Of the interpreter, whose programs run one after another, a second run takes the same way.
TWICE = not SHORT


def check(n, c, spatial, *, device="cpu", activation="silu", misaligned=False, **options):
    """Within 2× PyTorch's error and two ulps; bit-equal twice. Returns whether x is read once."""
    torch.manual_seed(0)
    tensors = case(n, c, spatial, **options)
    tensors = {k: None if v is None else v.to(device) for k, v in tensors.items()}
    x = tensors["x"]
    if misaligned:
        buffer = x.new_full((x.numel() + 1,), float("nan"))
        tensors["x"] = buffer[1:].as_strided(x.shape, x.stride(), 1).copy_(x)
    with fastdiff.backend("triton"):
        result = rms_norm_silu(**tensors, activation=activation)
        if TWICE:
            assert torch.equal(result, rms_norm_silu(**tensors, activation=activation))
    assert result.dtype == x.dtype and result.stride() == x.stride()
    truth = equations(**tensors, activation=activation)
    before = equations(**tensors, activation=None)
    own = error(eager(**tensors, activation=activation), truth)
    allowed = 2 * own + ulps(2, x.dtype, before)
    assert error(result, truth) <= allowed, (tuple(x.shape), options, error(result, truth), own)
    positions = x[:1, :1].numel()
    tiles = kernels.choose_tiles(c, positions, x.element_size(), not x.is_contiguous())
    return tiles.tile_channels >= c


def main():
    kernels.MOST, kernels.USUAL, kernels.LINE, kernels.SECTOR = 512, 256, 32, 8
    films = (None, "rows", "chunks")
    shapes = [(2, 12, (5, 7)), (1, 64, (16, 3)), (2, 300, (3, 3)), (2, 7, (9,)), (3, 40, ())]
    shapes += [(1, 20, (3, 2, 3)), (1, 1, (11,)), (2, 513, (2,)), (2, 3, (1, 1))]
    if SHORT:
        del shapes[3:-2]
    once = set()
    for i, shape in enumerate(shapes):
        for channels_last in (False, True):
            options = dict(channels_last=channels_last, film=films[i % 3])
            once.add(check(*shape, activation=("silu", None)[i % 2], **options))
    assert once == {True, False}
    print("shapes: agree")

    for dtype in (torch.float16, torch.bfloat16):
        for channels_last in (False, True):
            for c in (24, 300)[: 1 if SHORT else 2]:
                options = dict(dtype=dtype, channels_last=channels_last)
                check(2, c, (5, 6), film="chunks", **options)
                check(2, c, (5, 6), misaligned=True, parameters=torch.float32, **options)
    print("halves: agree")

    with fastdiff.backend("triton"):
        for c in (24, 300):
            x, weight = torch.randn(2, c, 5, 6), torch.ones(c)
            x[0, :, 2, 3] = 0
            x[1, 3, 1, 1], x[1, 4, 4, 5] = float("nan"), float("inf")
            result, truth = rms_norm_silu(x, weight), equations(x, weight)
            assert (result[0, :, 2, 3] == 0).all() and result[1, :, 1, 1].isnan().all()
            assert torch.equal(result.isnan(), truth.isnan())
            kept = ~truth.isnan()
            assert error(result[kept], truth[kept]) < 1e-5
            tiny = x[:1] * torch.logspace(-14, -8, 30).view(5, 6)
            for eps in (1e-12, 1e-9, 1):
                truth = equations(tiny, weight, eps=eps)
                assert error(rms_norm_silu(tiny, weight, eps=eps), truth) < 1e-5
            assert error(rms_norm_silu(x[:1] * 1e4, weight), equations(x[:1], weight)) < 1e-5
        assert rms_norm_silu(torch.empty(0, 4, 3), torch.ones(4)).shape == (0, 4, 3)
    print("edges: agree")


if __name__ == "__main__":
    main()

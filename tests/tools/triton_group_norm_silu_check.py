"""The launchers of group_norm_silu against float64, on any device.

As a script, which test_triton_group_norm_silu.py runs in a process of its own: in Triton's
interpreter, which is chosen at import, with tiles made small so that small shapes take every path.
"""

import os
import sys

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F

from fastdiff.kernels import group_norm_silu as kernels
from fastdiff.kernels import group_norm_tiles

EPS = 1e-5
DENSE = torch.contiguous_format
EMBEDDING, RESIDUAL = "embedding", "residual"

SHORT = __name__ == "__main__" and sys.argv[1:] == ["short"]
# Of the interpreter, whose programs run one after another, a second run takes the same way.
TWICE = not SHORT


def check(
    shape,
    groups,
    *,
    dtype=torch.float32,
    channels_last=False,
    film=True,
    add=None,
    silu=True,
    affine=torch.float32,
    mean=0.0,
    misaligned=False,
    device="cpu",
):
    """Outputs within 2× PyTorch's own error, gradients within 3×, and a few ulps; bit-equal twice.

    Returns the kernels' forward path: "once" or "chunks".
    """
    torch.manual_seed(0)
    n, channels = shape[:2]
    per_channel = (n, channels) + (1,) * (len(shape) - 2)

    def tensor(value):
        """``value`` in the layout under test, in memory that begins one element late."""
        memory = torch.channels_last if channels_last else torch.contiguous_format
        like = value.to(device, dtype).to(memory_format=memory)
        if not misaligned:
            return like
        buffer = like.new_full((like.numel() + 1,), float("nan"))
        return buffer[1:].as_strided(like.shape, like.stride(), 1).copy_(like)

    def blank(*sizes):
        return torch.full(sizes, float("nan"), device=device)

    x = tensor(torch.randn(shape) + mean)
    dy = tensor(torch.randn(shape))
    weight = bias = scale = shift = extra = None
    if affine is not None:
        weight = torch.randn(channels).to(device, affine)
        bias = torch.randn(channels).to(device, affine)
    if film:
        scale, shift = torch.randn(n, 2 * channels).to(device, dtype).chunk(2, 1)
    if add == EMBEDDING:
        extra = torch.randn(n, channels + 3)[:, 1:-2].to(device, dtype)
    elif add == RESIDUAL:
        extra = tensor(torch.randn(shape))

    def run():
        y, dx = tensor(torch.full(shape, float("nan"))), tensor(torch.full(shape, float("nan")))
        statistics = blank(2, n, groups)
        embedding = extra if add == EMBEDDING else None
        small = [
            None if v is None else torch.full_like(v, float("nan"), memory_format=DENSE)
            for v in (weight, bias, scale, shift, embedding)
        ]
        tensors = (x, weight, bias, scale, shift, extra)
        kernels.forward(x, groups, EPS, scale, shift, extra, silu)(*tensors, y, statistics)
        launch = kernels.backward(x, groups, scale, shift, extra, silu)
        launch(dy, *tensors, statistics, dx, *small)
        return y, *statistics, dx, *small

    def eager(to):
        """The same from PyTorch in dtype ``to``."""

        def leaf(value):
            return None if value is None else value.detach().to(to).requires_grad_()

        v, *small = leaves = [leaf(t) for t in (x, weight, bias, scale, shift, extra)]
        w, b, s, t, e = small
        h = v
        if e is not None:
            h = h + (e.view(per_channel) if add == EMBEDDING else e)
        rows = h.detach().reshape(n, groups, -1)
        h = F.group_norm(h, groups, w, b, EPS)
        if film:
            h = h * (1 + s.view(per_channel)) + t.view(per_channel)
        y = F.silu(h) if silu else h
        y.backward(dy.to(to))
        rstd = (rows.var(-1, unbiased=False) + EPS).rsqrt()
        if add == RESIDUAL:
            leaves[-1] = None  # its gradient is that of x
        return y.detach(), rows.mean(-1), rstd, *(None if t is None else t.grad for t in leaves)

    exact, theirs, ours = eager(torch.float64), eager(dtype), run()
    names = ("y", "mean", "rstd", "dx", "dweight", "dbias", "dscale", "dshift", "dadd")
    for name, ours_, theirs_, exact_ in zip(names, ours, theirs, exact, strict=True):
        assert (ours_ is None) == (exact_ is None)
        if ours_ is None:
            continue
        ulp = torch.finfo(ours_.dtype).eps
        error = (ours_.double() - exact_).abs().max().item()
        their_error = (theirs_.double() - exact_).abs().max().item()
        most = exact_.abs().max().item()
        if name == "mean":  # whose rounding is that of the elements, and these may cancel
            most = max(most, (1 / exact[2]).max().item())
        allowed = (3 if name.startswith("d") else 2) * their_error + 2 * ulp * most
        assert error <= allowed, (
            f"{name} of {shape}, {dtype}: {error:.2e}, PyTorch {their_error:.2e}, "
            f"largest {most:.2e}"
        )
    for first, second in zip(ours, run() if TWICE else ours, strict=True):
        assert first is second is None or torch.equal(first, second), f"{shape}: two runs differ"
    path = kernels.choose_tiles(
        channels, groups, x[0, 0].numel(), x.element_size(), not x.is_contiguous(), False
    )
    return "once" if path.read_once else "chunks"


def main():
    group_norm_tiles.MOST = {key: size // 16 for key, size in group_norm_tiles.MOST.items()}
    group_norm_tiles.CHUNK, group_norm_tiles.SMALL = 512, 128
    half, brain = torch.float16, torch.bfloat16
    shapes = [  # C/G: 4, 2, 1, 6, 18, 20, 3 and 200; odd positions; none; three dimensions
        ((2, 12, 5, 7), 3),
        ((1, 8, 16, 16), 4),
        ((2, 6, 9), 6),
        ((2, 12), 2),
        ((1, 18, 33, 13), 1),
        ((2, 40, 6, 6), 2),
        ((1, 96, 3, 2, 3), 32),
        ((1, 200, 9, 3), 1),
    ]
    if SHORT:
        del shapes[2:-3]
    paths = set()
    for i, (shape, groups) in enumerate(shapes):
        add = (None, EMBEDDING, RESIDUAL)[i % 3]
        paths.add(check(shape, groups, add=add, film=i % 2 == 0))
        if len(shape) == 4:
            paths.add(check(shape, groups, add=RESIDUAL, channels_last=True, silu=i % 2 == 0))
    assert paths == {"once", "chunks"}
    print("shapes: agree")

    for dtype in (half, brain):
        for channels_last in (False, True):
            check((2, 12, 9, 8), 3, dtype=dtype, channels_last=channels_last, affine=dtype)
            if SHORT:
                continue
            check((1, 8, 32, 16), 2, dtype=dtype, channels_last=channels_last, misaligned=True)
    print("halves: agree")

    for mean in (300.0, 1e4):  # std is 1
        for shape in ((1, 4, 12, 10), (1, 4, 33, 31))[: 1 if SHORT else 2]:
            for channels_last in (False, True):
                check(shape, 2, mean=mean, channels_last=channels_last)
    print("mean far above std: agrees")

    check((2, 6, 2), 3, affine=None, film=False, silu=False)
    check((1, 2, 1), 1)  # the smallest group
    check((40, 2, 2), 1, add=EMBEDDING)  # more samples than the finishing kernel's tile has
    print("edges: agree")


if __name__ == "__main__":
    main()

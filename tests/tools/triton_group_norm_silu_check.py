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
EMBEDDING, RESIDUAL = "embedding", "residual"


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
        means, rstd, sums = blank(n, groups), blank(n, groups), blank(3, n, channels)
        kernels.forward(x, groups, weight, bias, EPS, scale, shift, extra, silu, y, means, rstd)
        kernels.backward(
            dy, x, groups, weight, bias, means, rstd, scale, shift, extra, silu, dx, sums
        )
        return y, dx, means, rstd, sums

    def eager(to):
        """The same from PyTorch in dtype ``to``, with A and B as leaves: their gradients are the
        first two of the sums."""

        def cast(value):
            return None if value is None else value.to(to)

        v = cast(x).detach().requires_grad_()
        a = torch.ones(n, channels, dtype=to, device=device)
        b = torch.zeros_like(a)
        if affine is not None:
            a, b = a * cast(weight), b + cast(bias)
        if film:
            a, b = a * (1 + cast(scale)), b * (1 + cast(scale)) + cast(shift)
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        h = v
        if extra is not None:
            h = h + (cast(extra).view(per_channel) if add == EMBEDDING else cast(extra))
        rows = h.detach().reshape(n, groups, -1)
        h = F.group_norm(h, groups, eps=EPS) * a.view(per_channel) + b.view(per_channel)
        y = F.silu(h) if silu else h
        y.backward(dy.to(to))
        sum_dx = v.grad.reshape(n, channels, -1).sum(-1)
        rstd = (rows.var(-1, unbiased=False) + EPS).rsqrt()
        return y.detach(), v.grad, rows.mean(-1), rstd, torch.stack([b.grad, a.grad, sum_dx])

    exact, theirs, ours = eager(torch.float64), eager(dtype), run()
    names = ("y", "dx", "mean", "rstd", "sums")
    for name, ours_, theirs_, exact_ in zip(names, ours, theirs, exact, strict=True):
        gradient = name in ("dx", "sums")
        ulp = torch.finfo(ours_.dtype).eps
        for part in range(3) if name == "sums" else (...,):
            error = (ours_[part].double() - exact_[part]).abs().max().item()
            their_error = (theirs_[part].double() - exact_[part]).abs().max().item()
            most = exact_[part].abs().max().item()
            if name == "mean":  # whose rounding is that of the elements, and these may cancel
                most = max(most, (1 / exact[3]).max().item())
            allowed = (3 if gradient else 2) * their_error + 2 * ulp * most
            assert error <= allowed, (
                f"{name}[{part}] of {shape}, {dtype}: {error:.2e}, PyTorch {their_error:.2e}, "
                f"largest {most:.2e}"
            )
    for first, second in zip(ours, run(), strict=True):
        assert torch.equal(first, second), f"{shape}: two runs differ"
    path = kernels.choose_tiles(
        n, channels, groups, x[0, 0].numel(), x.element_size(), not x.is_contiguous(), False
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
    short = sys.argv[1:] == ["short"]
    if short:
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
            if short:
                continue
            check((1, 8, 32, 16), 2, dtype=dtype, channels_last=channels_last, misaligned=True)
    print("halves: agree")

    for mean in (300.0, 1e4):  # std is 1
        for shape in ((1, 4, 12, 10), (1, 4, 33, 31))[: 1 if short else 2]:
            for channels_last in (False, True):
                check(shape, 2, mean=mean, channels_last=channels_last)
    print("mean far above std: agrees")

    check((2, 6, 2), 3, affine=None, film=False, silu=False)
    check((1, 2, 1), 1)  # the smallest group
    for shape in ((0, 4, 3), (2, 4, 0)):
        x, statistics = torch.empty(shape), torch.empty(shape[0], 2)
        kernels.forward(x, 2, None, None, EPS, None, None, None, True, x, statistics, statistics)
        sums = torch.full((3, *shape[:2]), float("nan"))
        kernels.backward(
            x, x, 2, None, None, statistics, statistics, None, None, None, True, x, sums
        )
        assert torch.all(sums == 0)
    print("edges: agree")


if __name__ == "__main__":
    main()

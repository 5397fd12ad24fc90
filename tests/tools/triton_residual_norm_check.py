"""residual_norm by Triton against float64, on any device.

As a script, which test_triton_residual_norm.py runs in a process of its own: in Triton's
interpreter, which is chosen at import, with tiles made small so that small shapes take every path.
"""

import os
import sys

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch

import fastdiff
from fastdiff.kernels import group_norm_tiles
from fastdiff.ops import residual_norm

SHORT = __name__ == "__main__" and sys.argv[1:] == ["short"]
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


def check(
    shape,
    groups,
    *,
    second=0,
    residual=True,
    add=True,
    dtype=FULL,
    channels_last=False,
    affine=FULL,
    activation="silu",
    mean=0.0,
    device="cpu",
):
    """The sum is the one that float32 rounds to; y within 2× the error of PyTorch's own norm of it,
    and two ulps. In place, and a second time, the same bits. Returns the kernels' way through
    memory: "once" or "chunks"."""
    torch.manual_seed(0)
    n, channels, *size = shape
    memory = torch.channels_last if channels_last else torch.contiguous_format

    def tensor(width):
        return (torch.randn(n, width, *size) + mean).to(device, dtype).to(memory_format=memory)

    x = tensor(channels)
    added = {"residual": tensor(channels)} if residual else {}
    if add:
        added["add"] = torch.randn(channels).to(device, affine)
    beside = {"second": tensor(second)} if second else {}
    both = channels + second
    rows = [torch.randn(both).to(device, affine) for _ in range(2)] if affine else [None, None]

    def ours(x, **options):
        with fastdiff.backend("triton"):
            return residual_norm(
                x, groups, *rows, activation=activation, **added, **beside, **options
            )

    def equation(to):
        """Of the sum that is written, in dtype ``to``."""
        joined = torch.cat([total, *beside.values()], dim=1).to(to)
        given = [None if row is None else row.to(to) for row in rows]
        y = torch.nn.functional.group_norm(joined, groups, *given)
        return torch.nn.functional.silu(y) if activation else y

    total, y = ours(x)
    expected = x.float()
    for name, value in added.items():
        row = value.float()
        expected = expected + (row.view(-1, *(1,) * len(size)) if name == "add" else row)
    if dtype == BRAIN and device == "cpu":  # the interpreter cuts bits off where others round
        assert ((total - expected).abs() <= torch.finfo(dtype).eps * expected.abs()).all()
    else:
        assert torch.equal(total, expected.to(dtype)), f"sum of {shape}"
    assert (total is x) == (not added)
    exact, theirs = equation(torch.float64), equation(dtype)
    error = (y.double() - exact).abs().max().item()
    allowed = 2 * (theirs.double() - exact).abs().max().item()
    allowed += 2 * torch.finfo(dtype).eps * exact.abs().max().item()
    assert error <= allowed, f"y of {shape}, {dtype}: {error:.2e}, allowed {allowed:.2e}"
    for result in (total, y):
        assert result.is_contiguous(memory_format=memory)

    there = x.clone(memory_format=torch.preserve_format)
    written, again = ours(there, inplace=True)
    assert written is there and torch.equal(written, total) and torch.equal(again, y)

    positions = x[0, 0].numel()
    last = not x.is_contiguous()
    tiles = group_norm_tiles.choose_tiles(both, groups, positions, x.element_size(), last, False)
    return "once" if tiles.read_once else "chunks"


def main():
    group_norm_tiles.MOST = {key: size // 16 for key, size in group_norm_tiles.MOST.items()}
    group_norm_tiles.CHUNK, group_norm_tiles.SMALL = 512, 128
    shapes = [  # groups that lie in both tensors, odd positions, none, parts of groups, three axes
        ((2, 12, 5, 7), 3, 6),
        ((1, 8, 16, 16), 4, 0),
        ((1, 7, 9, 11), 4, 5),
        ((1, 18, 33, 13), 1, 9),
        ((2, 6, 9), 6, 12),
        ((2, 12), 2, 4),
        ((1, 96, 3, 2, 3), 32, 32),
        ((1, 150, 9, 3), 1, 50),
    ]
    if SHORT:
        shapes = [shapes[0], shapes[3]]
    paths = set()
    for i, (shape, groups, second) in enumerate(shapes):
        given = [(True, True), (False, True), (True, False), (False, False)]
        for residual, add in given[i % 4 :][:2] if SHORT else given:
            options = dict(second=second, residual=residual, add=add)
            paths.add(check(shape, groups, **options))
            if len(shape) == 4:
                paths.add(check(shape, groups, channels_last=True, activation=None, **options))
    assert paths == {"once", "chunks"}
    print("shapes: agree")

    for dtype in (HALF, BRAIN):
        for channels_last in (False, True):
            options = dict(dtype=dtype, channels_last=channels_last)
            check((2, 8, 9, 8), 3, second=4, affine=dtype, **options)
            if not SHORT:
                check((1, 8, 32, 16), 2, **options)
    print("halves: agree")

    for mean in (300.0, 1e4):  # std is 1
        for shape in ((1, 4, 12, 10), (1, 4, 33, 31))[: 1 if SHORT else 2]:
            for channels_last in (False, True):
                check(shape, 3, second=2, mean=mean, channels_last=channels_last)
    print("mean far above std: agrees")

    check((2, 6, 2), 3, affine=None, add=False)
    check((1, 1, 4, 3), 1, second=3)
    assert residual_norm(torch.empty(0, 4, 3), 2, None, None)[1].shape == (0, 4, 3)
    print("edges: agree")


if __name__ == "__main__":
    main()

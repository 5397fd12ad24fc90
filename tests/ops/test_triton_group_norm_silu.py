"""The Triton kernels of group_norm_silu: in the interpreter, compiled without a GPU, on a GPU."""

import pytest
import torch

import fastdiff
from fastdiff import ops
from kernel_tools import agreements

pytest.importorskip("triton")
from fastdiff.kernels import group_norm_silu as kernels  # noqa: E402
from fastdiff.kernels.group_norm_tiles import choose_tiles  # noqa: E402
from triton_tools import compiling, report  # noqa: E402

U_NETS = [  # C, positions: FIELD shapes of the published U-Nets, 32 groups
    (128, 32 * 32), (256, 32 * 32), (384, 32 * 32), (512, 16 * 16), (512, 8 * 8), (512, 4 * 4),
    (384, 64 * 64), (640, 32 * 32), (768, 16 * 16), (896, 8 * 8), (1024, 8 * 8),
    (128, 256 * 256), (256, 256 * 256), (384, 128 * 128), (768, 32 * 32),
]  # fmt: skip


@pytest.mark.parametrize("extent", ["short", pytest.param("complete", marks=pytest.mark.long)])
@pytest.mark.seconds
def test_the_interpreter_agrees_with_float64(extent):
    assert agreements("triton_group_norm_silu_check.py", extent) == 4


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("channels", "positions"), [*U_NETS, (32, 3), (97 * 32, 7), (512, 1)])
def test_tiles_cover_every_element_within_their_limits(
    channels, positions, channels_last, backward
):
    for itemsize in (2, 4):
        tiles = choose_tiles(channels, 32, positions, itemsize, channels_last, backward)
        group = channels // 32
        assert tiles.chunks * tiles.tile_positions >= positions
        assert tiles.tile_channels >= tiles.width
        assert tiles.parts * tiles.width >= group or tiles.width % group == 0
        assert tiles.tile_channels * tiles.tile_positions <= 32768
        if tiles.parts == 1:
            assert tiles.width % group == 0 and channels % tiles.width == 0
        if tiles.read_once:
            assert tiles.chunks == tiles.parts == 1
        else:
            slabs = channels * tiles.parts // group * group // tiles.width
            assert slabs * tiles.chunks > 32


def test_tiles_of_named_shapes():
    """CIFAR's groups fit one program; LSUN's first do not."""
    assert choose_tiles(256, 32, 1024, 2, False, False).read_once
    assert choose_tiles(256, 32, 1024, 2, False, True).read_once
    assert not choose_tiles(128, 32, 65536, 2, False, False).read_once


@pytest.mark.parametrize(("channels", "positions"), U_NETS)
def test_tiles_serve_one_image_and_many(channels, positions):
    """Whole sectors of memory side by side, and programs of one image for 8 multiprocessors."""
    for itemsize in (2, 4):
        for channels_last in (False, True):
            tiles = choose_tiles(channels, 32, positions, itemsize, channels_last, False)
            assert channels // tiles.width * tiles.parts * tiles.chunks >= 8
            side_by_side = tiles.width if channels_last else tiles.tile_positions
            assert side_by_side * itemsize >= 24


def launch(shape, dtype, channels_last, backward, film=True, groups=32):
    """Call a launcher on tensors without storage."""
    n, channels = shape[:2]
    x = torch.empty(shape, dtype=dtype, device="meta")
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    weight = torch.empty(channels, device="meta")
    scale = shift = None
    if film:
        scale, shift = torch.empty(n, 2 * channels, dtype=dtype, device="meta").chunk(2, 1)
    statistics = torch.empty(2, n, groups, device="meta")
    y = torch.empty_like(x)
    if backward:
        small = (weight, weight, scale, shift, None)
        launch = kernels.backward(x, groups, scale, shift, None, True)
        launch(x, x, weight, weight, scale, shift, None, statistics, y, *small)
    else:
        launch = kernels.forward(x, groups, 1e-5, scale, shift, None, True)
        launch(x, weight, weight, scale, shift, None, y, statistics)


FEW = [
    ((8, 256, 32, 32), torch.bfloat16, False),
    ((8, 256, 32, 32), torch.bfloat16, True),
    ((8, 384, 32, 32), torch.float32, True),
    ((1, 128, 256, 256), torch.bfloat16, True),
]
MANY = [
    ((8, channels, side, side), dtype, channels_last)
    for channels, side in ((128, 32), (384, 32), (512, 16), (512, 4), (256, 64), (384, 64),
                           (640, 32), (896, 8), (128, 256), (768, 32))
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for channels_last in (False, True)
]  # fmt: skip


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("capability", "cases"),
    [(90, FEW[:1])]
    + [
        pytest.param(*case, marks=pytest.mark.long)
        for case in [(80, FEW[:2]), (90, FEW), (100, FEW[:2])]
        + [(capability, MANY) for capability in (80, 90, 100)]
    ],
)
def test_compiles_without_spills(capability, cases, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    taken = {}
    for shape, dtype, channels_last in cases:
        with compiling(capability, tmp_path) as usages:
            launch(shape, dtype, channels_last, backward=False)
            launch(shape, dtype, channels_last, backward=True)
        taken[f"{shape} {dtype} {channels_last=}"] = usages
    report(capability, taken, spills=16 if cases is MANY else 0)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("channels", "positions"), [*U_NETS, (96, 17 * 17), (97 * 32, 49)])
def test_gpu_agrees_with_float64(channels, positions, channels_last, dtype):
    from triton_group_norm_silu_check import EMBEDDING, RESIDUAL, check

    side = round(positions**0.5)
    shape = (2, channels, side, side)
    options = dict(dtype=dtype, channels_last=channels_last, device="cuda")
    check(shape, 32, **options)
    check(shape, 32, add=EMBEDDING, film=False, misaligned=True, **options)
    check(shape, 32, add=RESIDUAL, silu=False, mean=100.0, **options)


@pytest.mark.cuda
@pytest.mark.long
@pytest.mark.parametrize("channels_last", [False, True])
def test_gpu_beyond_two_to_the_31_elements(channels_last):
    """The last sample of a tensor of 2.4·10⁹ elements comes out as it does alone."""
    x = torch.randn(9, 64, 2048, 2048, device="cuda").bfloat16()
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    with fastdiff.backend("triton"):
        y, alone = (ops.group_norm_silu(v, 32, None, None) for v in (x, x[8:]))
    assert torch.equal(y[8:], alone)

"""The Triton kernel of rms_norm_silu: in the interpreter, compiled without a GPU, on a GPU."""

import pytest
import torch

from kernel_tools import agreements

pytest.importorskip("triton")
from fastdiff.kernels import rms_norm_silu as kernels  # noqa: E402
from triton_tools import compiling, report  # noqa: E402

SHAPES = [  # C, positions: of a U-Net of 64 … 512 channels; odd ones, one channel, very many
    (64, 64 * 64), (64, 32 * 32), (128, 32 * 32), (256, 16 * 16), (512, 8 * 8), (1024, 8 * 8),
    (96, 17 * 17), (1, 9), (3, 256 * 256), (100_000, 4), (512, 1),
]  # fmt: skip


@pytest.mark.parametrize("extent", ["short", pytest.param("complete", marks=pytest.mark.long)])
@pytest.mark.seconds
def test_the_interpreter_agrees_with_float64(extent):
    assert agreements("triton_rms_norm_silu_check.py", extent) == 3


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("channels", "positions"), SHAPES)
def test_tiles_stay_within_their_limits(channels, positions, itemsize, channels_last):
    tiles = kernels.choose_tiles(channels, positions, itemsize, channels_last)
    elements = tiles.tile_channels * tiles.tile_positions
    assert elements <= kernels.MOST and elements <= 1024 * max(1, tiles.warps)
    assert tiles.tile_positions < 2 * positions
    if channels <= 1024:
        assert tiles.tile_channels >= channels  # read once
    if not channels_last:  # whole sectors of memory
        assert tiles.tile_positions * itemsize >= 32 or tiles.tile_positions >= positions


def launch(shape, dtype, channels_last, film):
    """Call the launcher on tensors without storage."""
    n, channels = shape[:2]
    x = torch.empty(shape, dtype=dtype, device="meta")
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    scale = shift = None
    if film:
        scale, shift = torch.empty(n, 2 * channels, dtype=dtype, device="meta").chunk(2, 1)
    weight = torch.empty(1, channels, 1, 1, device="meta")
    launch = kernels.forward(x, 1e-12, scale, shift, True)
    launch(x, weight, scale, shift, torch.empty_like(x))


FEW = [
    ((8, 64, 32, 32), torch.float32, False),
    ((8, 256, 16, 16), torch.bfloat16, True),
    ((8, 2048, 8, 8), torch.bfloat16, False),
]
MANY = [
    ((8, channels, side, side), dtype, channels_last)
    for channels, side in ((64, 64), (128, 32), (320, 17), (512, 8), (1024, 8), (40_000, 2))
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for channels_last in (False, True)
]  # fmt: skip


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("capability", "cases"),
    [(90, FEW[:1])]
    + [
        pytest.param(*case, marks=pytest.mark.long)
        for case in [(80, FEW), (90, FEW), (100, FEW)]
        + [(capability, MANY) for capability in (80, 90, 100)]
    ],
)
def test_compiles_without_spills(capability, cases, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    taken = {}
    for shape, dtype, channels_last in cases:
        with compiling(capability, tmp_path) as usages:
            launch(shape, dtype, channels_last, film=True)
            launch(shape, dtype, channels_last, film=False)
        taken[f"{shape} {dtype} {channels_last=}"] = usages
    report(capability, taken, spills=16 if cases is MANY else 0)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("channels", "positions"), SHAPES)
def test_gpu_agrees_with_float64(channels, positions, channels_last, dtype):
    from triton_rms_norm_silu_check import check

    options = dict(dtype=dtype, channels_last=channels_last, device="cuda")
    check(2, channels, (positions, 1), film="chunks", **options)
    check(2, channels, (1, positions), activation=None, misaligned=True, **options)

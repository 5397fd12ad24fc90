"""group_norm_silu's CUDA kernels: how calls are cut, and every way of cutting against float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_group_norm_silu import check as check_forward
from test_group_norm_silu_backward import check as check_backward

import extent
import fastdiff
from fastdiff.ops import group_norm_silu, native
from fastdiff.ops.group_norm_silu import op
from norm_cases import case, gradients, kernels_at_any_size, native_shape, run  # noqa: F401

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
# multiprocessors, shared bytes of a block, blocks of a cluster, bytes of L2
H200 = (132, 227 * 1024, 16, 60 * 2**20)
A100 = (108, 163 * 1024, 1, 40 * 2**20)
TINY = (3, 6 * 1024, 4, 16 * 1024)
NO_CLUSTERS = (2, 24 * 1024, 1, 8 * 1024)
FEW_AT_ONCE = (8, 24 * 1024, 1, 400 * 1024)
DTYPES = {torch.float32: 4, torch.bfloat16: 2}


def tile_of(shape, device, backward=False, aligned=True):
    return native.library().group_norm_tile(shape, device, backward, aligned)


# --- The plan: pure, without a GPU ---------------------------------------------------------------


@pytest.mark.seconds
@settings(deadline=None, max_examples=500)
@given(
    n=st.integers(1, 300),
    groups=st.integers(1, 64),
    width=st.one_of(st.integers(1, 64), st.integers(1, 9000)),
    positions=st.one_of(st.integers(1, 70), st.integers(1, 2**21)),
    dtype=st.sampled_from(sorted(DTYPES, key=str)),
    channels_last=st.booleans(),
    residual=st.booleans(),
    backward=st.booleans(),
    aligned=st.booleans(),
    device=st.sampled_from([H200, A100, TINY, NO_CLUSTERS]),
)
def test_a_tile_covers_the_tensor_and_fits_the_device(
    n, groups, width, positions, dtype, channels_last, residual, backward, aligned, device
):
    shape = native_shape(
        n, groups * width, positions, groups,
        dtype=dtype, channels_last=channels_last, add=2 * residual,
    )  # fmt: skip
    tile = tile_of(shape, device, backward, aligned)
    assert tile.slabs * tile.slab_channels == n * groups * width
    assert tile.slab_channels % width == 0 and (groups * width) % tile.slab_channels == 0
    assert tile.channel_parts * tile.part_channels >= tile.slab_channels
    assert (tile.channel_parts - 1) * tile.part_channels < tile.slab_channels
    assert tile.channel_parts == 1 or tile.slab_channels == width
    assert tile.position_parts * tile.part_positions >= positions
    assert (tile.position_parts - 1) * tile.part_positions < positions
    assert tile.parts == tile.position_parts * tile.channel_parts
    assert tile.slabs_at_once >= 1 and tile.slabs_at_once * tile.parts < 2**31
    vec = 16 // DTYPES[dtype] if tile.wide else 1
    assert not tile.wide or aligned
    row = tile.slab_channels if channels_last else tile.part_positions
    assert row % vec == 0 and (not channels_last or tile.part_channels % vec == 0)
    assert tile.lanes <= tile.threads and tile.threads % 32 == 0 and tile.lanes.bit_count() == 1
    assert tile.shared_bytes <= device[1]
    if tile.resident:
        assert tile.parts <= device[2] and (
            tile.slabs_at_once == tile.slabs or tile.slabs * tile.parts > 2**30
        )


def test_more_blocks_than_a_grid_has_take_several_launches():
    tile = tile_of(native_shape(2**34, 32, 16, 32), H200)
    assert tile.slabs_at_once < tile.slabs and tile.slabs_at_once * tile.parts < 2**31


# FIELD.md, section 2: the norms of the published U-Nets, (channels, side).
UNET_NORMS = [
    *itertools.product((128, 256, 384), (32, 64, 128)),
    *itertools.product((128, 256, 384, 512), (16, 32, 64)),
    *itertools.product((256, 384, 640, 768, 896, 1024), (8, 16, 32)),
    (512, 4), (256, 4), (128, 256), (256, 256),
]  # fmt: skip


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_the_norms_of_unets_move_what_they_must(batch, dtype, channels_last):
    """Read once: within 5 % of 2N bytes forward and 3N backward; twice: 3N, 5N, and named here."""
    twice = {(False, False): set(), (True, False): set()}
    for (channels, side), backward in itertools.product(UNET_NORMS, (False, True)):
        shape = native_shape(batch, channels, side**2, 32, dtype=dtype, channels_last=channels_last)
        tile = tile_of(shape, H200, backward)
        size = batch * channels * side**2 * DTYPES[dtype]
        floor = (3 if backward else 2) * size
        assert tile.wide
        if tile.resident:
            assert tile.bytes_moved <= 1.05 * floor, (channels, side, tile.bytes_moved / floor)
            continue
        assert tile.bytes_moved <= (5 if backward else 3) * size * 1.05
        twice.setdefault((backward, False), set()).add((channels, side))
    forward, backward = twice[False, False], twice[True, False]
    if not channels_last:
        assert forward <= {(256, 256)} and backward <= {(128, 256), (256, 256), (384, 128)}
    # Nothing below 128 x 128 is read twice.
    assert all(side >= 128 for _, side in forward | backward), (forward, backward)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
def test_every_launch_of_two_reads_fills_the_device(device, dtype, channels_last):
    """As few launches as half of L2 allows; in the smallest a block for each multiprocessor, or as
    many as there are parts worth a block; no more than run together."""
    multiprocessors, _, _, l2 = device
    twice = 0
    for (channels, side), n, backward in itertools.product(
        UNET_NORMS, (1, 2, 3, 7, 8, 32, 64, 100, 256), (False, True)
    ):
        shape = native_shape(n, channels, side**2, 32, dtype=dtype, channels_last=channels_last)
        tile = tile_of(shape, device, backward)
        if tile.resident:
            continue
        twice += 1
        slab = tile.slab_channels * side**2 * DTYPES[dtype]
        fit = max(1, min(tile.slabs, l2 // 2 // (slab * (1 + backward))))
        launches = -(-tile.slabs // fit)
        assert -(-tile.slabs // tile.slabs_at_once) == launches
        smallest, largest = tile.slabs // launches, -(-tile.slabs // launches)
        of_one_slab = min(multiprocessors, slab // 2**13) / 1.25  # parts are whole rows or accesses
        assert smallest * tile.parts >= min(multiprocessors, smallest * of_one_slab)
        if backward and tile.parts > 1:
            assert largest * tile.parts <= 2 * multiprocessors
    assert twice or device is H200  # which holds everything planar and narrow


# --- Values, however the tensor is cut -----------------------------------------------------------


@pytest.fixture
def served():
    if not native.cuda_serves(DEVICE):
        pytest.skip(native.cuda_problem(DEVICE))
    with fastdiff.backend("cuda"):
        yield


@pytest.fixture
def on_device(served, monkeypatch):
    """Call with a device's limits: what is smaller than the real one cuts small tensors."""
    tiles = []
    real = native.cuda_limits(DEVICE)

    def pretend(limits):
        if native.emulates_cuda():
            native.library().emulate_device(*limits)
        elif not all(a <= b for a, b in zip(limits[1:3], real[1:3], strict=True)):
            pytest.skip(f"this device has less: {real}")
        monkeypatch.setattr(native, "cuda_limits", lambda device: limits)
        return tiles

    original = op.tile_of

    def recorded(*arguments):
        tiles.append((original(*arguments), *arguments[2:]))
        return tiles[-1][0]

    monkeypatch.setattr(op, "tile_of", recorded)
    yield pretend
    if native.emulates_cuda():
        native.library().emulate_device(2, 227 * 1024, 16, 2**20)


CASES = [  # n, c, spatial, groups: few and many channels and positions, odd ones, one
    (2, 12, (9, 8), 3),
    (1, 32, (16, 12), 2),
    (3, 8, (33, 31), 4),
    (1, 96, (24, 20), 8),
    (2, 200, (3,), 2),
    (2, 24, (4, 3, 5), 8),
    (3, 64, (), 2),
    (1, 12, (1, 1), 2),
    (2, 4, (80, 90), 2),
]


def hurried() -> bool:
    """Emulated threads in make test: one shape of every kind, once."""
    return native.emulates_cuda() and not extent.everything


@pytest.mark.any_backend
@pytest.mark.parametrize("limits", [TINY, NO_CLUSTERS, H200], ids=["tiny", "no clusters", "H200"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_way_of_cutting(on_device, limits, channels_last):
    torch.manual_seed(0)
    tiles = on_device(limits)
    extras = itertools.cycle(
        [
            dict(film="chunks"),
            dict(add="embedding"),
            dict(add="residual", dtype=torch.bfloat16),
            dict(film="plain", dtype=torch.float16, mean=3.0),
            dict(parameters=None),
        ]
    )
    for n, c, spatial, groups in [CASES[i] for i in (0, 2, 7, 8)] if hurried() else CASES:
        for _ in range(1 if hurried() else 2):
            tensors = case(n, c, spatial, channels_last=channels_last, **next(extras))
            check_forward(tensors, groups, rounds=16)
            check_backward(tensors, groups, rounds=32)
    if len(tiles) == 0:
        return  # another backend than cuda runs this test
    for backward in (False, True):
        found = [tile for tile, of_backward, _ in tiles if of_backward == backward]
        assert {tile.wide for tile in found} == {True, False}
        if limits is not H200:
            assert {tile.resident for tile in found} == {True, False}
            assert any(not tile.resident and tile.slabs_at_once < tile.slabs for tile in found)
        if limits is not NO_CLUSTERS:
            assert any(tile.resident and tile.parts > 1 for tile in found)


@pytest.mark.any_backend
@pytest.mark.parametrize("channels_last", [False, True])
def test_two_reads_of_a_large_batch(on_device, channels_last):
    """Many launches, of which some have a slab less, and of every slab many parts."""
    torch.manual_seed(0)
    tiles = on_device(FEW_AT_ONCE)
    check_backward(case(19, 8, (40, 36), channels_last=channels_last, film="plain"), 1, rounds=32)
    for tile, backward, _ in tiles:
        launches = -(-tile.slabs // tile.slabs_at_once)
        assert not (backward and tile.resident) and (not backward or launches >= 10)
        assert not backward or (tile.parts >= 3 and tile.slabs % launches != 0)


@pytest.mark.any_backend
@pytest.mark.parametrize("channels_last", [False, True])
def test_groups_of_very_many_channels(on_device, channels_last):
    """More than a block has coefficients for: the parts cut the channels too."""
    torch.manual_seed(0)
    tiles = on_device(H200)
    tensors = case(1, 2 * 2500, (3,), channels_last=channels_last, film="plain", add="embedding")
    check_forward(tensors, 2, rounds=8)
    check_backward(tensors, 2, rounds=16)
    assert all(tile.channel_parts == 2 for tile, *_ in tiles)


@pytest.mark.any_backend
def test_the_order_of_threads_changes_no_bit(on_device):
    torch.manual_seed(0)
    every = itertools.product((TINY, H200), (False, True))
    for limits, channels_last in [(TINY, False), (H200, True)] if hurried() else every:
        on_device(limits)
        tensors = case(2, 32, (24, 20), channels_last=channels_last, film="plain", add="embedding")
        upstream = torch.randn_like(tensors["x"])
        first = run(group_norm_silu, tensors, 4)
        grads = gradients(group_norm_silu, tensors, 4, upstream)
        for _ in range(
            1 if hurried() else 2
        ):  # each launch of the emulation has an order of its own
            assert torch.equal(run(group_norm_silu, tensors, 4), first)
            again = gradients(group_norm_silu, tensors, 4, upstream)
            assert all(torch.equal(again[name], grads[name]) for name in grads)


@pytest.mark.any_backend
def test_a_launch_that_cuda_refuses_names_kernel_and_grid(on_device):
    """The plan believes in more shared memory than the device has."""
    if not native.emulates_cuda():
        pytest.skip("needs a device whose limits can be set")
    on_device(TINY)
    x = torch.randn(1, 8, 32, 32)
    expected = group_norm_silu(x, 4, None, None)
    native.library().emulate_device(2, 4 * 1024, 4, 2**20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "cuda_limits", lambda device: H200)
        refused = torch.randn(1, 2, 700, 700)
        with pytest.raises(RuntimeError, match="group_norm_silu: CUDA refused .* blocks of") as e:
            group_norm_silu(refused, 2, None, None)
        assert "bytes of shared memory: " in str(e.value) and "\n" not in str(e.value)
    on_device(TINY)
    assert torch.equal(group_norm_silu(x, 4, None, None), expected)  # the device is as before

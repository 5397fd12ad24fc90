"""The CUDA kernels of counter-based noise: in the emulation, or on a GPU."""

import numpy as np
import pytest
import torch

from fastdiff.ops import native
from fastdiff.ops.normal import normal
from fastdiff.ops.normal.op import FAST_ERROR
from kernel_tools import assert_drawn_alike

pytestmark = pytest.mark.any_backend
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def served():
    if not native.cuda_serves(DEVICE):
        pytest.skip(native.cuda_problem(DEVICE))


def drawn(out, **counters):
    return normal(tuple(out.shape), out=out, backend="cuda", **counters).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("few_blocks", [0, 1, 2], indirect=True)
@pytest.mark.parametrize("shape", [(3, 5, 17, 19), (2, 3, 32, 32), (5, 4), (2, 6001)])
def test_it_agrees_with_the_cpu_and_exact_normals_bit_for_bit(shape, few_blocks, dtype):
    counters = dict(seed=2**63 + 1, step=2**31 + 5, first_sample=2**40)
    expected = normal(shape, dtype=dtype, **counters)

    def blank(*shape):
        return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)

    wider = blank(*shape[:-1], shape[-1] + 8)
    outs = {
        "contiguous": blank(*shape),
        "misaligned": blank(expected.numel() + 1)[1:].view(shape),
        "guarded": wider[..., 4:-4] if len(shape) == 2 else blank(*shape),
    }
    if len(shape) == 4:
        outs["channels_last"] = blank(*shape).to(memory_format=torch.channels_last)
    fast = drawn(blank(*shape), **counters)
    assert_drawn_alike(fast, expected)
    for name, out in outs.items():
        assert torch.equal(drawn(out, **counters), fast), name
        assert torch.equal(drawn(out, exact=True, **counters), expected), name
    if len(shape) == 2:
        assert wider[:, :4].isnan().all() and wider[:, -4:].isnan().all()


@pytest.mark.parametrize("elements", [9, 16])
def test_counters_are_read_from_memory(elements):
    numbers = dict(seed=2**64 - 3, step=2**32 - 2)
    counters = dict(seed=torch.tensor(-3), step=torch.tensor(2**32 - 2))
    on_device = {name: value.to(DEVICE) for name, value in counters.items()}
    for first in (4, 2**40, 2**63 + 5, 2**64 - 1):  # the last one's second sample is number 0
        bits = torch.tensor([first - 2**64 if first >= 2**63 else first], device=DEVICE)
        out = torch.empty(2, elements, device=DEVICE)
        actual = drawn(out, first_sample=bits, exact=True, **on_device)
        for i in range(2):
            of_one = normal((1, elements), first_sample=(first + i) % 2**64, **numbers)
            assert torch.equal(actual[i : i + 1], of_one)


@pytest.mark.parametrize("few_blocks", [1], indirect=True)
def test_the_published_words(few_blocks):
    words = torch.zeros(700, 4, dtype=torch.int32, device=DEVICE)
    native.library().philox_cuda(
        words.data_ptr(),
        700,
        0xA4093822 | 0x299F31D0 << 32,
        0x85A308D3,
        0x13198A2E | 0x03707344 << 32,
        0x243F6A88 - 600,
        native.cuda_stream(DEVICE),
    )
    found = [word & 0xFFFFFFFF for word in words[600].tolist()]
    assert found == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_box_muller_at_the_edges_of_its_words():
    edges = [0, 1, 2, 127, 128, 2**24 - 1, 2**24, 2**24 + 1]
    edges += [quarter * 2**30 + d for quarter in (1, 2, 3) for d in (-129, -1, 0, 1, 64, 128)]
    edges += [0xB504F333 + d for d in (-300, 0, 300)]  # u about √½, where the logarithm's f jumps
    edges += [2**32 - 1, 2**32 - 128, 2**32 - 129, 2**32 - 2**10]
    words = np.array([(a, b) for a in edges for b in edges], np.uint32)
    if not native.emulates_cuda():
        pytest.skip("the emulation offers this arithmetic on words of the caller's choice")
    normals = [native.library().box_muller(*map(int, pair)) for pair in words]
    normals = np.array(normals, np.float32)
    u = (words.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)).astype(np.float64)
    assert (u > 0).all() and (u <= 1).all()
    radius, angle = np.sqrt(-2 * np.log(u[:, 0])), 2 * np.pi * u[:, 1]
    exact = np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1)
    # Beside four ulps: float64's own cos(π/2) is 6e-17, where the exact zero is right.
    assert np.all(np.abs(normals - exact) <= 4 * np.spacing(np.abs(normals)) + 1e-14)
    assert np.isfinite(normals).all()
    fast = [native.library().fast_box_muller(*map(int, pair)) for pair in words]
    assert np.abs(np.array(fast) - normals).max() <= FAST_ERROR


def test_fast_normals_err_within_their_bound():
    """The emulated functions err as much as NVIDIA allows; more words in the tails and near u = 1,
    where the radius and its relative error are largest."""
    if not native.emulates_cuda():
        pytest.skip("the emulation offers this arithmetic on words of the caller's choice")
    generator = np.random.default_rng(0)
    words = generator.integers(0, 2**32, (200_000, 2), np.uint64)
    words[:50_000, 0] >>= generator.integers(0, 32, 50_000, np.uint64)
    words[50_000:100_000, 0] = 2**32 - 1 - (words[50_000:100_000, 0] >> np.uint64(4))
    library = native.library()
    pairs = [tuple(map(int, pair)) for pair in words]
    exact, fast = (
        np.array([draw(*pair) for pair in pairs])
        for draw in (library.box_muller, library.fast_box_muller)
    )
    error = np.abs(fast - exact)
    assert 0.2 * FAST_ERROR < error.max() <= FAST_ERROR
    assert np.median(error[100_000:]) < 0.1 * FAST_ERROR

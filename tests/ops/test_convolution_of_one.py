"""Convolutions with a kernel of one, which may read x where it is."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastdiff.ops import convolution
from fastdiff.ops.convolution.packed import pack
from norm_cases import threads

# Whole tiles, tiles of one height, and places that no such tiles fill; one of many bands.
SIZES = [(8, 8), (3, 8), (5, 5), (7, 7), (1, 1), (1, 17), (48, 32)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("c, second", [(64, 0), (32, 96), (33, 0), (48, 64), (64, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_small_integers_are_exact(dtype, c, second, size):
    torch.manual_seed(0)

    def integers(*shape, most=4):
        return torch.randint(-most, most + 1, shape).float()

    x, rest = integers(3, c, *size).to(dtype), integers(3, second, *size).to(dtype)
    weight, residual = integers(40, c + second, 1, 1, most=2), integers(3, 40, *size).to(dtype)
    named = {"second": rest if second else None, "residual": residual, "moments": True}
    expected = F.conv2d(torch.cat([x, rest], 1).double(), weight.double()) + residual
    means = [expected.mean((2, 3)), expected.var((2, 3), unbiased=False)]
    for count in (1, 2, 5):
        with threads(count):
            y, moments = convolution(x, pack(weight, dtype), **named)
        assert torch.equal(y, expected.to(dtype))
        torch.testing.assert_close(moments.double(), torch.stack(means, 1), rtol=1e-5, atol=1e-5)


GUARDED = """
import ctypes, mmap, sys
import torch
from fastdiff.ops import convolution
from fastdiff.ops.convolution.packed import pack

def at_the_end(shape):  # of a mapping: what comes behind it cannot be read
    values = torch.randn(shape[0], *shape[2:], shape[1]).bfloat16()
    size = values.numel() * 2
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, room + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + room), mmap.PAGESIZE, 0) == 0
    placed = torch.frombuffer(pages, dtype=torch.bfloat16, count=size // 2, offset=room - size)
    return placed.view(values.shape).copy_(values).permute(0, 3, 1, 2)

for size in ((7, 7), (5, 5), (1, 1), (8, 8), (3, 8)):
    for second in (0, 64):
        x = at_the_end((2, 32, *size))
        rest = at_the_end((2, second, *size)) if second else None
        packed = pack(torch.randn(40, 32 + second, 1, 1), torch.bfloat16)
        y, _ = convolution(x, packed, second=rest)
        copies = (x.clone(), rest.clone() if second else None)
        assert torch.equal(convolution(copies[0], packed, second=copies[1])[0], y)
print("read within")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does")
def test_nothing_is_read_behind_x():
    ran = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True)
    assert ran.stdout.strip() == "read within", (ran.returncode, ran.stderr[-2000:])

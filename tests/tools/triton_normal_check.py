"""Run by test_rng.py in a process of its own: Triton's interpreter is chosen at import."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from fastdiff.kernels import normal as kernels  # noqa: E402
from fastdiff.ops import native
from fastdiff.ops.normal import normal  # noqa: E402
from kernel_tools import assert_drawn_alike  # noqa: E402

KNOWN_ANSWERS = [  # of Random123: counter, key, first word
    ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        0xD16CFE09,
    ),
]

for (quad, step, low, high), (k0, k1), first_word in KNOWN_ANSWERS:
    counter = dict(seed=k0 | k1 << 32, step=step, sample=low | high << 32, first_quad=quad)
    words = torch.empty(300, 4, dtype=torch.int32)  # the last two run over the counter's end
    kernels.philox(words, **counter)
    expected = torch.empty_like(words)
    native.library().philox_cpu(expected.data_ptr(), 300, *counter.values())
    assert torch.equal(words, expected)
    assert words[0, 0].item() & 0xFFFFFFFF == first_word
    print("words: agrees")

options = dict(seed=2**63 + 5, step=2**31 + 7, first_sample=2**33)
for shape in ((3, 5, 17, 21), (2, 1, 32, 64)):
    expected = normal(shape, **options)
    assert torch.equal(normal(shape, backend="triton", exact=True, **options), expected)

    out = torch.full(shape, float("nan")).to(memory_format=torch.channels_last)
    normal(shape, out=out, backend="triton", exact=True, **options)
    assert torch.equal(out, expected)
    print("float32: agrees")
    assert_drawn_alike(normal(shape, backend="triton", **options), expected)
    print("fast normals: agrees")

    tensors = dict(seed=torch.tensor(5 - 2**63), step=torch.tensor(2**31 + 7))
    first = torch.tensor(2**33)
    tensors |= {"exact": True}
    half = normal(shape, dtype=torch.float16, first_sample=first, backend="triton", **tensors)
    assert torch.equal(half, expected.half())
    first.fill_(-1)  # numbers 2^64 − 1, and then 0
    expected = normal(shape, first_sample=first, **tensors)
    actual = normal(shape, first_sample=first, backend="triton", **tensors)
    assert torch.equal(actual, expected)
    print("counters from memory: agrees")

# The interpreter truncates to bfloat16 where the GPU rounds: one ulp, 2^-7 of the value.
expected = normal(shape, **options)
drawn = normal(shape, dtype=torch.bfloat16, backend="triton", exact=True, **options)
torch.testing.assert_close(drawn.float(), expected, rtol=2**-7, atol=0)
print("bfloat16: agrees")

"""The Triton kernels of attention: in the interpreter, compiled without a GPU, on a GPU."""

import pytest
import torch

from kernel_tools import agreements

pytest.importorskip("triton")
from fastdiff.kernels import attention as kernels  # noqa: E402
from triton_tools import compiling, report  # noqa: E402

U_NETS = [  # heads, tokens, head_dim of the published U-Nets
    (1, 256, 256), (1, 16, 256), (1, 256, 512), (1, 64, 512), (4, 256, 64), (4, 64, 64),
    (4, 16, 64), (4, 256, 96), (4, 64, 128), (4, 256, 144), (4, 64, 192), (6, 1024, 64),
    (9, 256, 64), (12, 64, 64),
]  # fmt: skip


@pytest.mark.parametrize("extent", ["short", pytest.param("complete", marks=pytest.mark.long)])
@pytest.mark.seconds
def test_the_interpreter_agrees_with_float64(extent):
    assert agreements("triton_attention_check.py", extent) == 5


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [8, 16, 24, 40, 64, 80, 96, 97, 128, 144, 192, 256, 300, 512])
def test_chunks_cover_the_head(head_dim, itemsize):
    for tokens in (1, 16, 100, 1024):
        for tiles in kernels.choose_tiles(head_dim, tokens, itemsize):
            assert tiles.chunk * tiles.chunks >= head_dim
            assert tiles.chunk * (tiles.chunks - 1) < head_dim
            assert tiles.splits <= tiles.chunks
            assert min(tiles.chunk, tiles.rows, tiles.columns) >= 16  # what tl.dot takes


def launch(samples, heads, tokens, head_dim, dtype, token_major=False):
    """Call both launchers on tensors without storage."""

    def blank(rows):
        sizes = (samples, tokens, rows) if token_major else (samples, rows, tokens)
        t = torch.empty(sizes, dtype=dtype, device="meta")
        return t.transpose(1, 2) if token_major else t

    width = heads * head_dim
    lse = torch.empty(samples, heads, tokens, device="meta")
    qkv, out = blank(3 * width), blank(width)
    kernels.forward(qkv, heads, "heads_first", out)(qkv, out, lse)
    launch = kernels.backward(qkv, heads, "heads_first", out, out, qkv)
    launch(qkv, out, lse, blank(width), blank(3 * width))


SOME = [(6, 1024, 64, torch.bfloat16, False)]
MANY = [
    (*shape, dtype, token_major)
    for shape in [*U_NETS, (3, 77, 40), (2, 100, 300)]
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for token_major in (False, True)
]


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("capability", "cases"),
    [(90, SOME)]
    + [
        pytest.param(*case, marks=pytest.mark.long)
        for case in [(80, SOME), (100, [(1, 256, 512, torch.bfloat16, True)])]
        + [(capability, MANY) for capability in (80, 90, 100)]
    ],
)
def test_compiles_without_spills(capability, cases, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    taken = {}
    for case in cases:
        with compiling(capability, tmp_path) as usages:
            launch(8, *case)
        taken[str(case)] = usages
    report(capability, taken, spills=16 if cases is MANY else 0)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize(
    ("heads", "tokens", "head_dim"), [*U_NETS, (2, 33, 8), (3, 77, 40), (1, 1, 16), (2, 100, 300)]
)
def test_gpu_agrees_with_float64(heads, tokens, head_dim, token_major, dtype):
    from triton_attention_check import check

    for order in ("heads_first", "qkv_first"):
        check(
            2, heads, tokens, head_dim,
            order=order, dtype=dtype, token_major=token_major, device="cuda",
        )  # fmt: skip

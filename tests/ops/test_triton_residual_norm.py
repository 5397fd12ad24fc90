"""The Triton kernels of residual_norm: in the interpreter, compiled without a GPU, on a GPU."""

import re

import pytest
import torch

from kernel_tools import agreements

pytest.importorskip("triton")
import triton  # noqa: E402

from fastdiff.kernels import residual_norm as kernels  # noqa: E402
from triton_tools import compiling, meeting_new_kernels, report  # noqa: E402


@pytest.mark.parametrize("extent", ["short", pytest.param("complete", marks=pytest.mark.long)])
@pytest.mark.seconds
def test_the_interpreter_agrees_with_float64(extent):
    assert agreements("triton_residual_norm_check.py", extent) == 4


def launch(shape, second, dtype, channels_last):
    """Call the launcher, in place, on tensors without storage."""
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def tensor(channels):
        sizes = (shape[0], channels, *shape[2:])
        return torch.empty(sizes, dtype=dtype, device="meta", memory_format=layout)

    x = tensor(shape[1])
    beside = tensor(second) if second else None
    row = torch.empty(shape[1] + second, device="meta")
    launch = kernels.forward(x, beside, 32, 1e-5, True)
    launch(x, x, row[: shape[1]], beside, row, row, tensor(len(row)), x)


FEW = [
    ((8, 256, 32, 32), 128, torch.bfloat16, True),
    ((8, 256, 32, 32), 0, torch.bfloat16, True),
    ((8, 256, 16, 16), 256, torch.float32, True),
    ((1, 128, 256, 256), 128, torch.bfloat16, True),
    ((8, 192, 64, 64), 192, torch.bfloat16, False),
    ((8, 128, 32, 32), 128, torch.float32, False),
    ((8, 384, 32, 32), 0, torch.float32, False),
]
MANY = [
    ((8, channels, side, side), second, dtype, channels_last)
    for channels, second, side in (
        *((128, 0, 32), (128, 128, 32), (256, 256, 8), (384, 192, 32), (576, 384, 16)),
        *((768, 768, 8), (192, 192, 64), (128, 128, 128)),
    )
    for dtype in (torch.float32, torch.bfloat16)
    for channels_last in (False, True)
]  # fmt: skip


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("capability", "cases"),
    [(90, FEW[:1])]
    + [
        pytest.param(*case, marks=pytest.mark.long)
        for case in [(80, FEW[:2]), (90, FEW), (100, FEW[:2]), (90, MANY)]
    ],
)
def test_compiles_without_spills(capability, cases, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    taken = {}
    for case in cases:
        with compiling(capability, tmp_path) as usages:
            launch(*case)
        taken[str(case)] = usages
    report(capability, taken, spills=16 if cases is MANY else 0)


@pytest.mark.seconds
def test_channels_are_read_and_written_side_by_side(tmp_path, monkeypatch):
    """What is known of the pointers and of both tensors' channels lasts to the machine code."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    code = []

    def compile_source(source, target, options):
        code.append(triton.compile(source, target=target, options=options).asm["ptx"])

    with meeting_new_kernels(90, compile_source):
        launch((8, 128, 16, 16), 128, torch.bfloat16, True)
    widths = re.findall(r"(?:ld|st)\.global[\w.:]*?(v4\.b32|v2\.b32|b32|b16)", code[0])
    assert set(widths) == {"v4.b32"}, widths


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "channels, second, side", [(128, 0, 32), (256, 128, 32), (192, 192, 64), (96, 64, 17)]
)
def test_gpu_agrees_with_float64(channels, second, side, channels_last, dtype):
    from triton_residual_norm_check import check

    options = dict(second=second, dtype=dtype, channels_last=channels_last, device="cuda")
    check((2, channels, side, side), 32, **options)
    check((2, channels, side, side), 32, mean=100.0, activation=None, **options)

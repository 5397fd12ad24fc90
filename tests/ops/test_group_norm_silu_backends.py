"""group_norm_silu: the backend that serves a call, and an error line for every bad argument."""

import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad

import fastdiff
from fastdiff.errors import InputError
from fastdiff.ops import backends, group_norm_silu, native
from kernel_tools import each_isa
from norm_cases import equations

X = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0), device="cpu")
WEIGHT = torch.linspace(0.5, 1.5, 8)
BIAS = torch.linspace(-1, 1, 8)


def norm(x):
    return group_norm_silu(x, 2, WEIGHT, BIAS)


# --- Backends ---------------------------------------------------------------------------------


def test_named_backends_agree():
    with fastdiff.backend("reference"):
        reference = norm(X)
    with fastdiff.backend("native"):
        assert torch.allclose(norm(X), reference, atol=1e-6) and torch.equal(norm(X), norm(X))


@pytest.mark.parametrize(
    ("name", "x", "problem"),
    [
        ("triton", X, "it runs on CUDA devices, not on cpu"),
        ("cuda", X.double(), "its kernels take float32, bfloat16 and float16, not float64"),
        ("cuda", X, native.cuda_problem(X.device)),
        ("native", X.double(), "its kernels take float32, bfloat16 and float16, not float64"),
        ("native", X.to("meta"), "it runs on the CPU, not on meta"),
    ],
)
def test_a_named_backend_that_cannot_serve(monkeypatch, name, x, problem):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if name == "triton" and not backends.HAS_TRITON:
        problem = "the package triton is not installed"
    with fastdiff.backend(name):
        for call in (group_norm_silu, lambda *a: fastdiff.explain("group_norm_silu", *a)):
            with pytest.raises(InputError) as caught:
                call(x, 2, None, None)
            text = str(caught.value)
            assert problem in text and repr(name) in text and "\n" not in text


def test_the_instruction_sets_agree():
    for isa in each_isa():
        assert torch.allclose(norm(X), equations(X, 2, WEIGHT, BIAS).float(), atol=1e-5), isa


def test_explain(capsys):
    assert fastdiff.explain("group_norm_silu", X, 2, WEIGHT, BIAS).backend == "native"
    assert "group_norm_silu: native (the C++ kernel serves" in capsys.readouterr().out
    choice = fastdiff.explain(group_norm_silu, X.double(), 2, None, None)
    assert choice.backend == "reference" and "not float64" in choice.reason
    with fastdiff.backend("native"):
        assert "named by" in str(fastdiff.explain(group_norm_silu, X, 2, None, None))
    with forward_ad.dual_level():
        choice = fastdiff.explain(group_norm_silu, X, 2, None, None)
    assert choice.backend == "reference" and "torch.func" in choice.reason


@pytest.mark.seconds
def test_the_environment_names_a_backend():
    code = """
import torch, fastdiff
fastdiff.explain("group_norm_silu", torch.ones(1, 2, 3), 1, None, None)
"""
    for name, expected in [("reference", "reference (named by"), ("", "native (the C++")]:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True,
            env={**os.environ, "FASTDIFF_BACKEND": name},
        )  # fmt: skip
        assert expected in done.stdout, done.stderr


# --- Errors -----------------------------------------------------------------------------------

META = torch.device("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(3)},
            "x is (3,) float32 on cpu; expected floating-point (N, C",
        ),
        (
            {"x": torch.zeros(2, 8, 3).long()},
            "x is (2, 8, 3) int64 on cpu; expected",
        ),
        ({"x": torch.zeros(2, 8, 3).cfloat()}, "x is (2, 8, 3) complex64"),
        ({"x": [[1.0, 2.0]]}, "x is a list; expected floating-point (N, C, *spatial)"),
        ({"weight": 1.0}, "weight is a float; expected floating-point (8,) on cpu"),
        ({"num_groups": 3}, "num_groups=3; expected an int that divides x's 8 channels"),
        ({"num_groups": 0}, "num_groups=0; expected an int"),
        ({"num_groups": -2}, "num_groups=-2; expected an int"),
        ({"num_groups": 2.0}, "num_groups=2.0; expected an int"),
        ({"weight": None}, "give both weight and bias, or neither"),
        ({"bias": None}, "give both weight and bias, or neither"),
        ({"weight": torch.ones(7)}, "weight is (7,) float32 on cpu; expected floating-point (8,)"),
        ({"bias": torch.ones(1)}, "bias is (1,) float32 on cpu; expected floating-point (8,)"),
        ({"bias": torch.ones(8).int()}, "bias is (8,) int32 on cpu; expected floating-point (8,)"),
        (
            {"weight": torch.ones(8, device=META)},
            "weight is (8,) float32 on meta; expected",
        ),
        ({"scale": torch.ones(2, 8)}, "give both scale and shift, or neither"),
        ({"shift": torch.ones(2, 8)}, "give both scale and shift, or neither"),
        (
            {"scale": torch.ones(2, 8), "shift": torch.ones(8)},
            "shift is (8,) float32 on cpu; expected floating-point (2, 8)",
        ),
        (
            {"scale": torch.ones(1, 8), "shift": torch.ones(2, 8)},
            "scale is (1, 8) float32 on cpu; expected floating-point (2, 8)",
        ),
        (
            {"scale": torch.ones(2, 8, 1), "shift": torch.ones(2, 8, 1)},
            "scale is (2, 8, 1) float32 on cpu; expected floating-point (2, 8)",
        ),
        (
            {"scale": torch.ones(2, 8), "shift": torch.ones(2, 8, device=META)},
            "shift is (2, 8) float32 on meta; expected floating-point (2, 8) on cpu",
        ),
        (
            {"add": torch.ones(2, 4)},
            "add is (2, 4) float32 on cpu; expected floating-point (2, 8) or (2, 8, 3) on cpu",
        ),
        ({"add": torch.ones(2, 8, device=META)}, "add is (2, 8) float32 on meta; expected"),
        (
            {"add": torch.ones(2, 8, 3).bfloat16()},
            "add is (2, 8, 3) bfloat16 on cpu; expected torch.float32, as a residual has",
        ),
        ({"add": torch.ones(2, 8, 3, device=META)}, "add is (2, 8, 3) float32 on meta; expected"),
        ({"activation": "relu"}, "activation='relu'; expected 'silu' or None"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_bad_arguments_get_one_line(change, message, backend):
    arguments = dict(
        x=torch.zeros(2, 8, 3), num_groups=2, weight=torch.ones(8), bias=torch.zeros(8)
    )
    with fastdiff.backend(backend), pytest.raises(InputError) as caught:
        group_norm_silu(**{**arguments, **change})
    text = str(caught.value)
    assert text.startswith("group_norm_silu: ") and message in text and "\n" not in text

"""Naming backends, and asking whether a kernel may be launched past PyTorch's dispatcher."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import fastdiff
from fastdiff.errors import InputError
from fastdiff.ops import backends, dispatch, native
from fastdiff.ops.dispatch import OPERATIONS, Operation


@pytest.fixture(autouse=True)
def nothing_named():
    with fastdiff.backend(None):
        yield


# --- Naming -----------------------------------------------------------------------------------


def test_set_backend():
    fastdiff.set_backend("reference")
    assert backends.named() == "reference"
    fastdiff.set_backend(None)
    assert backends.named() is None


def test_backend_restores_what_was_named():
    with fastdiff.backend("reference"):
        with fastdiff.backend("native"):
            assert backends.named() == "native"
        assert backends.named() == "reference"
        with fastdiff.backend(None):
            assert backends.named() is None
        with pytest.raises(ZeroDivisionError), fastdiff.backend("triton"):
            1 / 0  # noqa: B018
        assert backends.named() == "reference"
    assert backends.named() is None


def test_a_name_holds_in_every_thread():
    seen = []
    with fastdiff.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.named()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


@pytest.mark.parametrize("name", ["cpu", "", "Native", 3])
def test_an_unknown_name(name):
    with pytest.raises(InputError, match="expected one of reference, native, triton, cuda or None"):
        fastdiff.set_backend(name)
    with pytest.raises(InputError, match=f"^backend is {name!r}; "), fastdiff.backend(name):
        pass
    assert backends.named() is None


def from_environment(value):
    code = "from fastdiff.ops import backends; print(backends.named())"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, backends.VARIABLE: value},
    )  # fmt: skip


@pytest.mark.seconds
def test_the_environment_names_one():
    assert from_environment("triton").stdout == "triton\n"
    assert from_environment("").stdout == "None\n"
    last = from_environment("fast").stderr.strip().splitlines()[-1]
    assert "FASTDIFF_BACKEND is 'fast'; expected one of reference, native" in last


# --- The plan, and what a named backend serves -------------------------------------------------


@pytest.mark.parametrize("has_triton", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_default(monkeypatch, dtype, has_triton):
    monkeypatch.setattr(backends, "HAS_TRITON", has_triton)
    kernels = dtype in backends.KERNEL_DTYPES
    monkeypatch.setattr(native, "cuda_problem", lambda device: "it has none")
    cpu, cuda, mps, meta = map(torch.device, ("cpu", "cuda", "mps", "meta"))

    def default(device):
        backend, reason = dispatch.default(OPERATIONS["q_sample"], device, dtype)
        assert "\n" not in reason
        assert ("not float64" in reason) == (not kernels)
        return backend

    assert default(cpu) == ("native" if kernels else "reference")
    assert default(cuda) == ("triton" if kernels and has_triton else "reference")
    assert default(mps) == default(meta) == "reference"


OP = Operation("op", ("native", "triton"), choose=None)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "serves"),
    [
        ("reference", "cpu", torch.float64, True),
        ("reference", "mps", torch.float32, True),
        ("native", "cpu", torch.float16, True),
        ("native", "cpu", torch.float64, False),
        ("native", "cuda", torch.float32, False),
        ("triton", "cuda", torch.bfloat16, True),
        ("triton", "cuda", torch.float64, False),
        ("triton", "cpu", torch.float32, False),
        ("cuda", "cuda", torch.float32, False),
    ],
)
def test_require(monkeypatch, name, device, dtype, serves):
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if serves:
        dispatch.require(OP, name, torch.device(device), dtype)
        return
    with pytest.raises(InputError, match=f"^op: the backend '{name}' was named, but ") as caught:
        dispatch.require(OP, name, torch.device(device), dtype)
    assert "\n" not in str(caught.value)


def test_triton_on_the_cpu_needs_its_interpreter(monkeypatch):
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dispatch.require(OP, "triton", torch.device("cpu"), torch.float32)
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    with pytest.raises(InputError, match="the package triton is not installed"):
        dispatch.require(OP, "triton", torch.device("cpu"), torch.float32)


# --- Past the dispatcher ----------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def test_plain_tensors_are_launched_directly():
    x = torch.zeros(2)
    assert backends.launches_directly(x, None, torch.nn.Parameter(x))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert backends.launches_directly(x)
    with torch.inference_mode():
        assert backends.launches_directly(x)
    assert not backends.launches_directly(x, x.as_subclass(Subclass))


def test_nobody_who_listens_is_passed_by():
    x = torch.zeros(2)
    seen = []

    def ask(x):
        seen.append((backends.launches_directly(x), backends.transforms()))
        return x.sum()

    with FakeTensorMode():
        ask(torch.zeros(2))
    with torch.profiler.profile():
        ask(x)
    torch.jit.trace(ask, (x,), check_trace=False)
    assert seen and set(seen) == {(False, False)}
    seen.clear()
    torch.func.grad(ask)(x)
    torch.vmap(ask)(x[None])
    with forward_ad.dual_level():
        ask(x)
    assert seen == [(False, True)] * 3
    assert backends.launches_directly(x) and not backends.transforms()


def test_the_compiler_is_not_passed_by():
    @torch.compile(fullgraph=True, backend="eager")
    def ask(x):
        return x + 1 if backends.launches_directly(x) else x

    assert ask(torch.zeros(2)).sum() == 0


def test_transforms_refuse_a_named_kernel():
    def choose(x):
        seen.append(dispatch.choose(OP, x).backend)
        return x.sum()

    seen, x = [], torch.zeros(2)
    torch.func.grad(choose)(x)
    with fastdiff.backend("reference"):
        torch.func.grad(choose)(x)
    assert seen == ["reference"] * 2
    for name in ("native", "triton"):
        with fastdiff.backend(name), pytest.raises(InputError, match=f"^op: the backend '{name}'"):
            torch.func.grad(choose)(x)


def test_a_batch_of_gradients_is_not_launched_directly():
    seen = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            seen.append(backends.launches_backward_directly(dy))
            return dy

    x = torch.zeros(2, requires_grad=True)
    torch.autograd.grad(Watch.apply(x), x, torch.ones(2))
    torch.autograd.grad(Watch.apply(x), x, torch.ones(3, 2), is_grads_batched=True)
    assert seen == [True, False]


# --- Operations that a backend has no kernels of -----------------------------------------------


@pytest.mark.parametrize(
    "kernels, backend", [(("native",), "native"), (("triton",), "reference"), ((), "reference")]
)
def test_the_plan_passes_by_the_kernels_that_an_operation_has_not(kernels, backend):
    x = torch.zeros(2)
    op = Operation("twice", kernels, lambda x: dispatch.choose(op, x))
    planned = op.choose(x)
    assert planned.backend == backend
    for name, language in dispatch.LANGUAGES.items():
        if name not in kernels:
            with fastdiff.backend(name):
                choice = op.choose(x)
            assert choice.backend == backend
            assert choice.reason == (
                f"{name!r} was named, there is no {language} kernel of twice: {planned.reason}"
            )
    on_gpu, reason = dispatch.default(op, torch.device("cuda"), x.dtype)
    if "triton" not in kernels:
        assert on_gpu == "reference" and reason == "there is no kernel of twice for GPUs"


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_named_backend_that_has_kernels_raises_where_they_do_not_serve(monkeypatch, name):
    """By the device, the dtype, or what is asked for, as by gradients."""
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    op = Operation("twice", ("native", name), lambda x, missing="": dispatch.choose(op, x, missing))
    for x, missing in (
        (torch.zeros(2, device="meta"), ""),
        (torch.zeros(2, dtype=torch.float64), ""),
        (torch.zeros(2), dispatch.NO_GRADIENTS),
    ):
        with fastdiff.backend(name), pytest.raises(InputError, match=f"'{name}' was named, but "):
            op.choose(x, missing)
        assert op.choose(x, missing).backend == "reference"


@pytest.mark.parametrize("gradients", [False, True])
def test_what_cuda_has_no_kernels_of_is_served_as_the_plan_says(gradients):
    qkv, x, weight = torch.zeros(1, 96, 256), torch.zeros(1, 8, 4), torch.ones(8)
    x.requires_grad_(gradients)
    calls = (("attention", (qkv, 1)), ("rms_norm_silu", (x, weight)))
    for name, arguments in calls:
        planned = OPERATIONS[name].choose(*arguments)
        with fastdiff.backend("cuda"):
            choice = fastdiff.explain(name, *arguments)
            assert getattr(fastdiff.ops, name)(*arguments).shape[0] == 1
        assert choice.backend == planned.backend
        why = f"'cuda' was named, there is no CUDA C++ kernel of {name}: {planned.reason}"
        assert choice.reason == why


def test_transforms_get_the_reference_where_the_name_has_no_kernels():
    qkv = torch.randn(1, 6, 4)
    with fastdiff.backend("cuda"):
        gradient = torch.func.grad(lambda x: fastdiff.ops.attention(x, 1).square().sum())(qkv)
    assert gradient.any()

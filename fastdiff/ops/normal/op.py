"""Counter-based Gaussian noise: sample i of seed s is the same array in any batch, on any device.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC'11) with

    counter = (element // 4, step, sample low word, sample high word)
    key     = (seed low word, seed high word)

where ``element`` counts within one sample in logical C, H, W order. Its words (r0, r1) and
(r2, r3) become elements 4k, 4k+1 and 4k+2, 4k+3 by Box–Muller, with u = (r + ½)·2⁻³²:

    (z0, z1) = √(−2 ln u0) · (cos 2πu1, sin 2πu1)

The integers agree bit for bit on every backend. For float32 and below, u is rounded to float32;
the native CPU, CUDA and Triton fills then agree bit for bit too, and the reference, which
computes in float64 from the same u, agrees with them to a few float32 ulps.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_device
from fastdiff.errors import InputError
from fastdiff.ops import backends, native
from fastdiff.ops.counters import (
    X_T_STEP,
    Counters,
    check_counter,
    check_first_sample,
    low_bits,
    value_or_address,
)
from fastdiff.ops.layouts import Layout, sample_layout
from fastdiff.ops.normal.reference import reference_sample

MAX_SAMPLE_ELEMENTS = 2**34  # a 32-bit counter word of four elements each
BACKENDS = ("native", "cuda", "triton", "reference")


def normal(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    step: int | Tensor = X_T_STEP,
    first_sample: int | Tensor = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Standard normal noise of ``shape`` (N, …); sample i is number ``first_sample + i``.

    seed, step, first_sample: 0 ≤ seed < 2⁶⁴, 0 ≤ step < 2³² (X_T_STEP, sampling_step, known_step,
    training_step) and 0 ≤ first_sample ≤ 2⁶⁴ − N. Each may be an int64 tensor of one element on
    the output's device: its low 64 or, of a step, 32 bits are read where the noise is drawn, on a
    GPU without a synchronisation. Numbers counted from a tensor's wrap around at 2⁶⁴.
    dtype: float32, bfloat16, float16, or float64, which only the reference draws.
    out: filled and returned; it gives dtype and device and may have any memory format: the values
    depend on logical positions alone.
    backend: "native" (CPU), "cuda", "triton" or "reference"; None lets ``default`` choose.

    Raises InputError for a bad argument or a named backend that cannot serve the call, and
    NativeLibraryError where the native library is needed and cannot be loaded.
    """
    shape = _checked_shape(shape)
    if out is None:
        out = torch.empty(shape, dtype=_checked_dtype(dtype), device=check_device(device))
    else:
        _check_out(out, shape)
    counters = Counters(
        seed=check_counter("seed", seed, 2**64, out.device),
        step=check_counter("step", step, 2**32, out.device),
        first_sample=check_first_sample(first_sample, shape[0], out.device),
    )
    launch = _LAUNCHERS[_choose(out, backend)]
    if out.numel() == 0:
        return out
    layout = sample_layout(out)
    if layout is None:  # strides that no (channels, spatial) pair describes
        dense = torch.empty_like(out, memory_format=torch.contiguous_format)
        numbers: dict[str, Any] = {"seed": seed, "step": step, "first_sample": first_sample}
        return out.copy_(normal(shape, **numbers, out=dense, backend=backend))
    launch(out, layout, counters)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # written behind autograd's back
    return out


def draw_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """N(0, 1) of x's shape, dtype, device and memory layout, by ``torch.randn``.

    Drawn in logical order whatever the layout, so that channels_last changes no number.
    Raises InputError for a generator of another device.
    """
    if generator is not None and generator.device.type != x.device.type:
        raise InputError(
            f"the generator is on {generator.device} but the samples are on {x.device}: "
            f"make it with torch.Generator('{x.device.type}')"
        )
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return noise if x.is_contiguous() else torch.empty_like(x).copy_(noise)


def default(device_type: str, dtype: torch.dtype, *, cuda_kernel: bool, triton: bool) -> str:
    """The backend for a call: a pure function of the output and of what is installed.

    cuda_kernel: compiled kernels serve the device; triton: the package is installed.
    """
    if dtype == torch.float64:
        return "reference"
    if device_type == "cpu":
        return "native"
    if device_type == "cuda" and cuda_kernel:
        return "cuda"
    if device_type == "cuda" and triton:
        return "triton"
    return "reference"


def _choose(out: Tensor, backend: str | None) -> str:
    if backend is None:
        on_cuda = out.device.type == "cuda"
        return default(
            out.device.type,
            out.dtype,
            cuda_kernel=on_cuda and native.cuda_serves(out.device),
            triton=on_cuda and backends.HAS_TRITON,
        )
    device_type = out.device.type
    serves = {
        "native": device_type == "cpu" and out.dtype != torch.float64,
        "cuda": out.dtype != torch.float64 and native.cuda_serves(out.device),
        # Triton's interpreter takes CPU tensors; without it Triton refuses them by itself.
        "triton": out.dtype != torch.float64 and backends.HAS_TRITON,
        "reference": True,
    }
    if backend not in serves:
        raise InputError(f"backend is {backend!r}: expected one of {', '.join(BACKENDS)} or None")
    if not serves[backend]:
        raise InputError(
            f"backend {backend!r} cannot draw {out.dtype} on {out.device}: "
            "name another, or None to let fastdiff choose"
        )
    return backend


# --- Launching --------------------------------------------------------------------------------


def _launch_native(out: Tensor, layout: Layout, counters: Counters) -> None:
    step, seed, first_sample = counters
    assert seed is not None
    numbers = low_bits(seed, 64), low_bits(step, 32), low_bits(first_sample, 64)
    native.library().normal_cpu(_fill(out, layout, *numbers), torch.get_num_threads())


def _launch_cuda(out: Tensor, layout: Layout, counters: Counters) -> None:
    step, seed, first_sample = counters
    assert seed is not None
    pairs = value_or_address(seed), value_or_address(step), value_or_address(first_sample)
    numbers, addresses = zip(*pairs, strict=True)
    with backends.device_of(out):
        native.library().normal_cuda(
            _fill(out, layout, *numbers), *addresses, native.cuda_stream(out.device)
        )


def _launch_triton(out: Tensor, layout: Layout, counters: Counters) -> None:
    from fastdiff.kernels import normal as kernels

    with backends.device_of(out):
        kernels.fill(out, layout, counters)


def _launch_reference(out: Tensor, layout: Layout, counters: Counters) -> None:
    # float64 arithmetic, which some accelerators lack: those are served from the CPU.
    device = out.device if out.device.type in ("cpu", "cuda") else torch.device("cpu")
    assert counters.seed is not None
    seed, step = low_bits(counters.seed, 64), low_bits(counters.step, 32)
    first = low_bits(counters.first_sample, 64)
    for i, sample in enumerate(out):
        number = low_bits(first + i, 64)
        values = reference_sample(
            sample.numel(), seed=seed, step=step, sample=number, dtype=out.dtype, device=device
        )
        sample.copy_(values.view(sample.shape))


_LAUNCHERS = {
    "native": _launch_native,
    "cuda": _launch_cuda,
    "triton": _launch_triton,
    "reference": _launch_reference,
}


def _fill(out: Tensor, layout: Layout, seed: int, step: int, first_sample: int) -> Any:
    return native.library().NormalFill(
        out=out.data_ptr(),
        dtype=native.DTYPE_CODES[out.dtype],
        samples=out.shape[0],
        **layout._asdict(),
        seed=seed,
        step=step,
        first_sample=first_sample,
    )


# --- Checks -----------------------------------------------------------------------------------


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise InputError(f"shape is {shape!r}: expected a sequence of integers (N, …)") from None
    if not sizes or min(sizes) < 0:
        raise InputError(f"shape is {sizes}: expected (N, …) without negative sizes")
    elements = math.prod(sizes[1:])
    if elements > MAX_SAMPLE_ELEMENTS:
        raise InputError(
            f"shape is {sizes}: one sample has {elements} elements, "
            f"expected at most {MAX_SAMPLE_ELEMENTS}"
        )
    return sizes


def _checked_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in native.DTYPE_CODES and dtype != torch.float64:
        raise InputError(f"dtype is {dtype}: expected float32, bfloat16, float16 or float64")
    return dtype


def _check_out(out: Tensor, shape: tuple[int, ...]) -> None:
    _checked_dtype(out.dtype)
    if tuple(out.shape) != shape:
        raise InputError(f"out has shape {tuple(out.shape)}: expected {shape}")
    if out.requires_grad:
        raise InputError("out requires grad: expected a tensor that autograd does not track")
    overlapping = out.numel() > 0 and any(
        size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)
    )
    if overlapping or out.layout != torch.strided:
        raise InputError("out must be a strided tensor whose elements do not share memory")

"""Counter-based Gaussian noise: sample i of seed s is the same array in any batch, on any device.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC'11) with

    counter = (element // 4, step, sample low word, sample high word)
    key     = (seed low word, seed high word)

where ``element`` counts within one sample in logical C, H, W order. Its words (r0, r1) and
(r2, r3) become elements 4k, 4k+1 and 4k+2, 4k+3 by Box–Muller, with u = (r + ½)·2⁻³²:

    (z0, z1) = √(−2 ln u0) · (cos 2πu1, sin 2πu1)

The integers agree bit for bit on every backend. For float32 and below, u is rounded to float32;
the native CPU draws the same bits with every instruction set, and the reference, which computes in
float64 from the same u, agrees with it to a few float32 ulps. The kernels for GPUs take logarithm,
root, sine and cosine from the hardware: their normals are the CPU's up to 1.2e-5 (``FAST_ERROR``;
csrc/cuda/fast_normal.h), before they are rounded to the output's dtype. ``exact=True``, or
``FASTDIFF_EXACT_NORMALS=1`` in the environment for all that draws in a process, gives the CPU's
bits there too; fused operations then read noise that is drawn before them.
"""

import itertools
import math
import operator
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_device
from fastdiff.errors import InputError
from fastdiff.ops import backends, dispatch, native
from fastdiff.ops.counters import (
    X_T_STEP,
    Counter,
    arguments,
    check_counters,
    low_bits,
)
from fastdiff.ops.dispatch import Operation
from fastdiff.ops.layouts import Layout, sample_layout
from fastdiff.ops.native import code
from fastdiff.ops.normal.reference import reference_sample

EXACT_VARIABLE = "FASTDIFF_EXACT_NORMALS"
FAST_ERROR = 1.2e-5  # of a normal that a GPU draws, absolute
Numbers = tuple[Counter, Counter, Counter]  # step, seed, first sample
MAX_SAMPLE_ELEMENTS = 2**34  # a 32-bit counter word of four elements each
# The first that serves is chosen. Not among the OPERATIONS: it is no function of tensors.
KERNELS = ("native", "cuda", "triton")
OPERATION = Operation("normal", KERNELS, choose=lambda *_: NotImplemented)


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
    exact: bool | None = None,
) -> Tensor:
    """Standard normal noise of ``shape`` (N, …); sample i is number ``first_sample + i``.

    seed, step, first_sample: 0 ≤ seed < 2⁶⁴, 0 ≤ step < 2³² (X_T_STEP, sampling_step, known_step,
    training_step) and 0 ≤ first_sample ≤ 2⁶⁴ − N. Each may be an int64 tensor of one element on
    the output's device: its low 64 or, of a step, 32 bits are read where the noise is drawn, on a
    GPU without a synchronisation. Numbers counted from a tensor's wrap around at 2⁶⁴.
    dtype: float32, bfloat16, float16, or float64, which only the reference draws.
    out: filled and returned; it gives dtype and device and may have any memory format: the values
    depend on logical positions alone.
    backend: "native" (CPU), "cuda", "triton" or "reference"; None: the first of them that serves.
    exact: on a GPU the CPU's bits, for three times the arithmetic, not its numbers up to 1.2e-5.
    None: as ``FASTDIFF_EXACT_NORMALS`` in the environment says, 0 (where nothing is said) or 1.

    Raises InputError for a bad argument or a named backend that cannot serve the call, and
    NativeLibraryError where the native library is needed and cannot be loaded.
    """
    shape = _checked_shape(shape)
    if out is None:
        out = torch.empty(shape, dtype=_checked_dtype(dtype), device=check_device(device))
    else:
        _check_out(out, shape)
    counters = check_counters(step, seed, first_sample, 2**32, out)
    backend = _choose(out, backend)
    if out.numel() == 0:
        return out
    layout = sample_layout(out)
    if layout is None:  # strides that no (channels, spatial) pair describes
        dense = torch.empty_like(out, memory_format=torch.contiguous_format)
        numbers: dict[str, Any] = {"seed": seed, "step": step, "first_sample": first_sample}
        return out.copy_(normal(shape, **numbers, out=dense, backend=backend, exact=exact))
    if backend == "reference":
        _fill_by_reference(out, counters)
    else:
        with backends.device_of(out):
            _launch(backend, out, layout, counters, _exact if exact is None else exact)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # written behind autograd's back
    return out


def drawn_apart(backend: str) -> bool:
    """Whether noise is drawn before the fused operation that ``backend`` serves: it would draw fast
    normals, and the process wants exact ones."""
    return _exact and backend in ("triton", "cuda")


def draw_at(counters: Numbers, base: int, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The noise of a fused operation on x by itself, in x's layout and, unless ``dtype`` is given,
    in x's own dtype; the operation's steps are the generator's from ``base`` on."""
    step, seed, first_sample = counters
    step = (step.long() if isinstance(step, Tensor) else step) + base
    out = torch.empty_like(x, dtype=dtype, requires_grad=False)
    return normal(tuple(out.shape), seed=seed, step=step, first_sample=first_sample, out=out)


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


def _choose(out: Tensor, backend: str | None) -> str:
    tensor = (out.device, out.dtype)
    if backend is None:
        serving = (k for k in KERNELS if not dispatch.problem(OPERATION, k, *tensor))
        return next(serving, "reference")
    if backend not in backends.BACKENDS:
        expected = ", ".join(backends.BACKENDS)
        raise InputError(f"backend is {backend!r}: expected one of {expected} or None")
    dispatch.require(OPERATION, backend, *tensor)
    return backend


def _launch(backend: str, out: Tensor, layout: Layout, counters: Numbers, exact: bool) -> None:
    step, seed, first_sample = counters
    if backend == "triton":
        from fastdiff.kernels import normal as kernels

        kernels.launch_for(out.shape[0], layout, exact)(out, *counters)
        return
    given = arguments(backend, seed), arguments(backend, step, 32), arguments(backend, first_sample)
    numbers, *addresses = zip(*given, strict=True)
    place = (out.data_ptr(), code(out), out.shape[0])
    fill = native.library().NormalFill(*place, *layout, *numbers)
    exactly = () if backend == "native" else (exact,)
    native.launch("normal", backend, out, fill, *itertools.chain(*addresses), *exactly)


def _fill_by_reference(out: Tensor, counters: Numbers) -> None:
    # float64 arithmetic, which some accelerators lack: those are served from the CPU.
    device = out.device if out.device.type in ("cpu", "cuda") else torch.device("cpu")
    step, seed, first = map(low_bits, counters, (32, 64, 64))
    for i, sample in enumerate(out):
        number = low_bits(first + i, 64)
        values = reference_sample(
            sample.numel(), seed=seed, step=step, sample=number, dtype=out.dtype, device=device
        )
        sample.copy_(values.view(sample.shape))


# --- Checks -----------------------------------------------------------------------------------


def _checked_exact(said: str) -> bool:
    if said not in ("", "0", "1"):
        raise InputError(f"{EXACT_VARIABLE} is {said!r}; expected 0 or 1")
    return said == "1"


_exact = _checked_exact(os.environ.get(EXACT_VARIABLE, ""))


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
    overlapping = out.numel() > 0 and 0 in out.stride()
    overlapping = overlapping and any(
        size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)
    )
    if overlapping or out.layout != torch.strided:
        raise InputError("out must be a strided tensor whose elements do not share memory")

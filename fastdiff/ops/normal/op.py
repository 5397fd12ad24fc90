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
from typing import Any, NamedTuple, SupportsIndex

import torch

from fastdiff.checks import check_device
from fastdiff.errors import InputError
from fastdiff.ops import backends, native

# The counter's steps, never shared: x_T, then the sampling steps, then q_sample's: the training
# steps, and the rows of a sampler after which it noises what an inpainted image knows.
X_T_STEP = 0
TRAINING_STEP_BASE = 2**31
FIRST_KNOWN_STEP = 2**30  # of q_sample's

MAX_SAMPLE_ELEMENTS = 2**34  # a 32-bit counter word of four elements each
BACKENDS = ("native", "cuda", "triton", "reference")


def sampling_step(index: int) -> int:
    """The counter's step for sampling step ``index`` = 0, 1, … (0 is the noisiest)."""
    return 1 + check_integer("sampling step", index, TRAINING_STEP_BASE - 1)


def training_step(index: int) -> int:
    """The counter's step for training step ``index`` = 0, 1, …"""
    return TRAINING_STEP_BASE + check_integer("training step", index, FIRST_KNOWN_STEP)


def known_step(index: int) -> int:
    """The counter's step for the noise of an inpainted image's known region after row ``index``."""
    limit = 2**32 - TRAINING_STEP_BASE - FIRST_KNOWN_STEP
    return TRAINING_STEP_BASE + FIRST_KNOWN_STEP + check_integer("known step", index, limit)


def normal(
    shape: Sequence[int],
    *,
    seed: int | torch.Tensor,
    step: int | torch.Tensor = X_T_STEP,
    first_sample: int | torch.Tensor = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Standard normal noise of ``shape`` (N, …); sample i is number ``first_sample + i``.

    seed, step, first_sample: 0 ≤ seed < 2⁶⁴, 0 ≤ step < 2³² (X_T_STEP, sampling_step, known_step,
    training_step) and 0 ≤ first_sample ≤ 2⁶⁴ − N. Each may be an int64 tensor of one element on
    the output's device: its low 64 or, of a step, 32 bits are read where the noise is drawn, on a
    GPU without a synchronisation. Numbers counted from a tensor's wrap around at 2⁶⁴.
    dtype: float32, bfloat16, float16, or float64, which only the reference draws.
    out: filled and returned; it gives dtype and device and may have any memory format: the values
    depend on logical positions alone.
    backend: "native" (CPU), "cuda", "triton" or "reference"; None lets ``plan`` choose.

    Raises InputError for a bad argument or a named backend that cannot serve the call, and
    NativeLibraryError where the native library is needed and cannot be loaded.
    """
    shape = _checked_shape(shape)
    if out is None:
        out = torch.empty(shape, dtype=_checked_dtype(dtype), device=check_device(device))
    else:
        _check_out(out, shape)
    seed = check_counter("seed", seed, 2**64, out.device)
    step = check_counter("step", step, 2**32, out.device)
    first_sample = check_first_sample(first_sample, shape[0], out.device)

    launch = _LAUNCHERS[_choose(out, backend)]
    if out.numel() == 0:
        return out
    layout = sample_layout(out)
    if layout is None:  # strides that no (channels, spatial) pair describes
        dense = torch.empty_like(out, memory_format=torch.contiguous_format)
        launch(dense, _contiguous_layout(shape), seed, step, first_sample)
        return out.copy_(dense)
    launch(out, layout, seed, step, first_sample)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # written behind autograd's back
    return out


def draw_like(x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
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


def plan(device_type: str, dtype: torch.dtype, *, cuda_kernel: bool, triton: bool) -> str:
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


# --- The reference ---------------------------------------------------------------------------


def philox4x32(counter: torch.Tensor, key: tuple[int, int]) -> torch.Tensor:
    """Philox4x32-10 of ``counter``, int64 (…, 4) holding 32-bit words, under two 32-bit key words.

    Returns int64 (…, 4) of 32-bit words. Salmon et al. 2011, section 3.3.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(10):
        # int64 wraps at 2^64, which keeps all 64 bits of the product; >> drags the sign, so mask.
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        high0, low0 = (product0 >> 32) & mask, product0 & mask
        high1, low1 = (product1 >> 32) & mask, product1 & mask
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack((c0, c1, c2, c3), dim=-1)


def reference_sample(
    elements: int,
    *,
    seed: int,
    step: int,
    sample: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """One sample's ``elements`` values, flat, by the equations of this module."""
    quads = torch.arange(-(-elements // 4), device=device)
    counter = torch.stack(
        (
            quads,
            torch.full_like(quads, step),
            torch.full_like(quads, sample & 0xFFFFFFFF),
            torch.full_like(quads, sample >> 32),
        ),
        dim=-1,
    )
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    u = words.to(torch.float64 if dtype == torch.float64 else torch.float32) * 2.0**-32 + 2.0**-33
    u = u.to(torch.float64).view(-1, 2)
    radius, angle = (-2.0 * u[:, 0].log()).sqrt(), 2.0 * math.pi * u[:, 1]
    z = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten()[:elements]
    # Through float32, so that bfloat16 and float16 are rounded from where the kernels round them.
    return z if dtype == torch.float64 else z.to(torch.float32).to(dtype)


# --- Launching -------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where a sample's elements stand, in elements: logical index channel·spatial + position."""

    channels: int
    spatial: int
    sample_stride: int
    channel_stride: int
    spatial_stride: int


def sample_layout(out: torch.Tensor) -> Layout | None:
    """``out``'s samples as (channels, spatial) with strides, or None where that cannot be said."""
    shape, strides = out.shape, out.stride()
    sample_stride = strides[0] if shape[0] > 1 else math.prod(shape[1:])
    whole = _merged_stride(shape[1:], strides[1:])
    if whole is not None:
        return Layout(1, math.prod(shape[1:]), sample_stride, 0, whole)
    spatial_stride = _merged_stride(shape[2:], strides[2:])
    if spatial_stride is None:
        return None
    return Layout(shape[1], math.prod(shape[2:]), sample_stride, strides[1], spatial_stride)


def _merged_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The stride of these dimensions taken as one, or None where they do not follow each other."""
    merged, next_stride = 1, None
    for size, stride in reversed(list(zip(shape, strides, strict=True))):
        if size == 1:
            continue
        if next_stride is None:
            merged = stride
        elif stride != next_stride:
            return None
        next_stride = stride * size
    return merged


def _contiguous_layout(shape: Sequence[int]) -> Layout:
    elements = math.prod(shape[1:])
    return Layout(1, elements, elements, 0, 1)


def _choose(out: torch.Tensor, backend: str | None) -> str:
    if backend is None:
        on_cuda = out.device.type == "cuda"
        return plan(
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


Counter = int | torch.Tensor


def _launch_native(
    out: torch.Tensor, layout: Layout, seed: Counter, step: Counter, first_sample: Counter
) -> None:
    numbers = low_bits(seed, 64), low_bits(step, 32), low_bits(first_sample, 64)
    fill = _fill(out, layout, *numbers)
    native.library().normal_cpu(fill, torch.get_num_threads())


def _launch_cuda(
    out: torch.Tensor, layout: Layout, seed: Counter, step: Counter, first_sample: Counter
) -> None:
    counters = map(value_or_address, (seed, step, first_sample))
    numbers, addresses = zip(*counters, strict=True)
    fill = _fill(out, layout, *numbers)
    with backends.device_of(out):
        native.library().normal_cuda(fill, *addresses, native.cuda_stream(out.device))


def _launch_triton(
    out: torch.Tensor, layout: Layout, seed: Counter, step: Counter, first_sample: Counter
) -> None:
    from fastdiff.kernels import normal as kernels

    with backends.device_of(out):
        kernels.fill(out, layout, seed, step, first_sample)


def _launch_reference(
    out: torch.Tensor, layout: Layout, seed: Counter, step: Counter, first_sample: Counter
) -> None:
    # float64 arithmetic, which some accelerators lack: those are served from the CPU.
    device = out.device if out.device.type in ("cpu", "cuda") else torch.device("cpu")
    seed, step, first = low_bits(seed, 64), low_bits(step, 32), low_bits(first_sample, 64)
    for i, sample in enumerate(out):
        values = reference_sample(
            sample.numel(),
            seed=seed,
            step=step,
            sample=low_bits(first + i, 64),
            dtype=out.dtype,
            device=device,
        )
        sample.copy_(values.view(sample.shape))


_LAUNCHERS = {
    "native": _launch_native,
    "cuda": _launch_cuda,
    "triton": _launch_triton,
    "reference": _launch_reference,
}


def _fill(out: torch.Tensor, layout: Layout, seed: int, step: int, first_sample: int) -> Any:
    return native.library().NormalFill(
        out=out.data_ptr(),
        dtype=native.DTYPE_CODES[out.dtype],
        samples=out.shape[0],
        **layout._asdict(),
        seed=seed,
        step=step,
        first_sample=first_sample,
    )


def low_bits(counter: Counter, bits: int) -> int:
    """A counter's low bits as an unsigned number; a tensor is read for it."""
    return int(counter) & (2**bits - 1)


def value_or_address(counter: Counter) -> tuple[int, int]:
    """A number and no address, or a tensor's address: its value is read on the device."""
    return (0, counter.data_ptr()) if isinstance(counter, torch.Tensor) else (counter, 0)


# --- Checks ----------------------------------------------------------------------------------


def check_integer(name: str, value: SupportsIndex, limit: int) -> int:
    """``value`` as an int if 0 ≤ value < limit."""
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name} is {value!r}: expected an integer") from None
    if not 0 <= number < limit:
        raise InputError(f"{name} is {number}: expected 0 <= {name} < {limit}")
    return number


def check_counter(name: str, value: Counter, limit: int, device: torch.device) -> Counter:
    """``value`` if it is a counter: 0 ≤ value < limit, or an int64 element on ``device``."""
    if not isinstance(value, torch.Tensor):
        return check_integer(name, value, limit)
    if value.dtype != torch.int64 or value.numel() != 1 or value.device != device:
        raise InputError(
            f"{name} is a {value.dtype} tensor of {value.numel()} elements on {value.device}: "
            f"expected an integer, or an int64 tensor of one element on {device}"
        )
    return value


def check_first_sample(value: Counter, samples: int, device: torch.device) -> Counter:
    """``value`` if it is a counter from which ``samples`` numbers stay below 2⁶⁴, or a tensor."""
    return check_counter("first_sample", value, 2**64 - max(samples - 1, 0), device)


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


def _check_out(out: torch.Tensor, shape: tuple[int, ...]) -> None:
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

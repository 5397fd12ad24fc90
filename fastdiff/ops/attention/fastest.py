"""Which implementation of attention is fastest: a pure function of what is known before a call.

The rule for the CPU rests on the tables in benchmarks/results/attention_plan, one for a machine and
a number of threads, which ``python benchmarks/measure_attention_plan.py`` measures;
tests/ops/test_attention_plan.py holds the rule and all of them together. The exceptions' reason:
a CPU with AMX multiplies bfloat16 matrices several times faster than float32 vectors can, and
fastdiff's backward does not use it, nor does its forward where the library was built without.
"""

from typing import NamedTuple

import torch

from fastdiff.ops import backends

IMPLEMENTATIONS = ("native", "triton", "sdpa", "matmuls", "reference")
FLASH_HEAD_DIM = 256  # where FlashAttention and cuDNN stop


class Workload(NamedTuple):
    """What decides.

    training: a backward will follow; token_major: the channels of a token are neighbours;
    isa: of the native library; tiles: its forward multiplies bfloat16 in AMX's; amx: PyTorch does.
    The last three matter on the CPU alone.
    """

    device_type: str
    dtype: torch.dtype
    tokens: int
    head_dim: int
    training: bool
    token_major: bool
    isa: str = ""
    tiles: bool = False
    amx: bool = False


def fastest(work: Workload) -> tuple[str, str]:
    """One of IMPLEMENTATIONS, and the reason in words.

    "sdpa" is PyTorch's scaled_dot_product_attention, "matmuls" the same written out in the input's
    dtype; both are plain PyTorch, as "reference" is.
    """
    if work.dtype not in backends.KERNEL_DTYPES:
        dtype = backends.short(work.dtype)
        return "reference", f"the kernels take float32, bfloat16 and float16, not {dtype}"
    if work.device_type == "cpu":
        return _fastest_on_cpu(work)
    if work.device_type != "cuda":
        return "sdpa", f"there are no kernels for {work.device_type} devices"
    if not backends.HAS_TRITON:
        return "sdpa", "PyTorch's SDPA: Triton is not installed"
    if work.head_dim > FLASH_HEAD_DIM:
        reason = f"head_dim {work.head_dim} > {FLASH_HEAD_DIM}, where PyTorch's fast SDPA ends"
        return "triton", reason
    if not work.token_major:  # SDPA would write all scores out: its math kernel reads any strides
        return "triton", "channel-major, which PyTorch's fast SDPA does not read"
    return "sdpa", f"PyTorch's SDPA has fast kernels up to head_dim {FLASH_HEAD_DIM}"


def _fastest_on_cpu(work: Workload) -> tuple[str, str]:
    if work.isa == "baseline":
        return "sdpa", "PyTorch's SDPA: the C++ kernel is fast with AVX2 or AVX-512"
    if work.dtype == torch.bfloat16 and work.amx:
        shape = f"{work.tokens} tokens, head_dim {work.head_dim} in bfloat16 with AMX"
        if work.training:
            if work.tokens >= 192 and work.head_dim >= 32:
                return "matmuls", f"PyTorch's matrix products are measured faster for {shape}"
        elif (
            not work.tiles
            and work.token_major
            and work.tokens >= 32
            and work.tokens * work.head_dim >= 4096
        ):
            return "sdpa", f"PyTorch's SDPA is measured faster for {shape}"
    return "native", "the C++ kernel is measured faster than PyTorch's SDPA"

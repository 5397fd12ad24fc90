"""Which implementation of attention serves a call: a pure function of what is known before it.

The rule for the CPU rests on the tables in benchmarks/results/attention_plan, one for a machine and
a number of threads, which ``python benchmarks/measure_attention_plan.py`` measures;
tests/ops/test_attention_plan.py holds the rule and all of them together. The exceptions' reason:
a CPU with AMX multiplies bfloat16 matrices several times faster than float32 vectors can, PyTorch
(oneDNN) uses it, and fastdiff's kernel does not. In float32 and float16, and on small or
channel-major inputs, which PyTorch copies first, the kernel is the faster one.
"""

from dataclasses import dataclass

import torch

from fastdiff.ops import backends

IMPLEMENTATIONS = ("native", "triton", "sdpa", "matmuls", "reference")
FLASH_HEAD_DIM = 256  # where FlashAttention and cuDNN stop


@dataclass(frozen=True)
class Call:
    """What the plan looks at.

    training: a backward will follow; token_major: the channels of a token are neighbours;
    isa: of the native library; amx: PyTorch multiplies bfloat16 matrices in AMX tiles. The last two
    matter on the CPU alone.
    """

    device_type: str
    dtype: torch.dtype
    tokens: int
    head_dim: int
    training: bool
    token_major: bool
    isa: str = ""
    amx: bool = False


def plan(call: Call) -> tuple[str, str]:
    """One of IMPLEMENTATIONS, and the reason in words.

    "sdpa" is PyTorch's scaled_dot_product_attention, "matmuls" the same written out in the input's
    dtype; both are plain PyTorch, as "reference" is.
    """
    if call.dtype not in backends.KERNEL_DTYPES:
        return "reference", backends.default_reason(torch.device(call.device_type), call.dtype)
    if call.device_type == "cpu":
        return _plan_cpu(call)
    if call.device_type != "cuda":
        return "sdpa", backends.default_reason(torch.device(call.device_type), call.dtype)
    if not backends.HAS_TRITON:
        return "sdpa", "PyTorch's SDPA: Triton is not installed"
    if call.head_dim > FLASH_HEAD_DIM:
        reason = f"head_dim {call.head_dim} > {FLASH_HEAD_DIM}, where PyTorch's fast SDPA ends"
        return "triton", reason
    return "sdpa", f"PyTorch's SDPA has fast kernels up to head_dim {FLASH_HEAD_DIM}"


def _plan_cpu(call: Call) -> tuple[str, str]:
    if call.isa == "baseline":
        return "sdpa", "PyTorch's SDPA: the C++ kernel is fast with AVX2 or AVX-512"
    if call.dtype == torch.bfloat16 and call.amx:
        shape = f"{call.tokens} tokens, head_dim {call.head_dim} in bfloat16 with AMX"
        if call.training:
            if call.tokens >= 192 and call.head_dim >= 32:
                return "matmuls", f"PyTorch's matrix products are measured faster for {shape}"
        elif call.token_major and call.tokens >= 32 and call.tokens * call.head_dim >= 4096:
            return "sdpa", f"PyTorch's SDPA is measured faster for {shape}"
    return "native", "the C++ kernel is measured faster than PyTorch's SDPA"

"""Which implementation of attention is the fastest for a call: a pure function of what is known."""

from dataclasses import dataclass

import torch

from fastdiff import backends


@dataclass(frozen=True)
class Call:
    """What the plan looks at. ``matrices`` are samples × heads, ``training`` is with a backward.

    isa: of the native library, "avx512" for one; amx: PyTorch multiplies bfloat16 matrices in AMX
    tiles. Both only matter on the CPU.
    """

    device_type: str
    dtype: torch.dtype
    matrices: int
    tokens: int
    head_dim: int
    training: bool
    isa: str
    amx: bool


def plan(call: Call) -> tuple[str, str]:
    """(implementation, reason); the implementations are those of ``attention.IMPLEMENTATIONS``."""
    return "native", "x"


_ = backends

"""The bytes that an operation has to move: each operand read or written once."""

from torch import Tensor


def q_sample(x_start: Tensor, *, noise: Tensor | None = None, returns_drawn: bool = False) -> int:
    """x_start and x_t; the noise where it is given, or drawn and returned."""
    given = 0 if noise is None else noise.nbytes
    return x_start.nbytes * (2 + returns_drawn) + given


def posterior_step(
    x_t: Tensor,
    output: Tensor,
    *,
    learned: bool = False,
    noise: Tensor | None = None,
    prev_x_start: Tensor | None = None,
    returns_x_start: bool = True,
) -> int:
    """x_t and x_prev; of the output each half of the batch under guidance, and one learned
    variance; what is given besides; x_start where it is returned."""
    parts = len(output) // len(x_t) + learned
    given = sum(0 if tensor is None else tensor.nbytes for tensor in (noise, prev_x_start))
    return x_t.nbytes * (2 + returns_x_start) + x_t.numel() * output.itemsize * parts + given
